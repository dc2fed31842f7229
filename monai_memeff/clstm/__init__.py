"""C-LSTM: remember one slab at a time."""

from monai_memeff.clstm.cell import GatedConvLSTMCell
from monai_memeff.clstm.engine import FreezeUNetHandler
from monai_memeff.clstm.figure import SaveAgreementD, SaveAgreementd, SaveAgreementDict, save_agreement
from monai_memeff.clstm.inferer import SlabInferer
from monai_memeff.clstm.network import CLSTMUNet
from monai_memeff.clstm.slabs import NiftiSlabs
from monai_memeff.clstm.transforms import SliceSequence, SliceSequenceD, SliceSequenced, SliceSequenceDict
from monai_memeff.clstm.unet import SliceBatchNorm2d, SliceUNet

__all__ = [
    "CLSTMUNet",
    "FreezeUNetHandler",
    "GatedConvLSTMCell",
    "NiftiSlabs",
    "SaveAgreementD",
    "SaveAgreementDict",
    "SaveAgreementd",
    "SlabInferer",
    "SliceBatchNorm2d",
    "SliceSequence",
    "SliceSequenceD",
    "SliceSequenceDict",
    "SliceSequenced",
    "SliceUNet",
    "save_agreement",
]
