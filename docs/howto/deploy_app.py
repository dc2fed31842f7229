"""A CT series through a MONAI bundle with an overlay, in MONAI Deploy App SDK 4.0, and DICOM SEG out."""

import os
from pathlib import Path

from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application
from monai.deploy.core.domain import Image
from monai.deploy.core.io_type import IOType
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)
from pydicom.sr.codedict import codes

from monai_memeff.errors import exit_in_one_line
from monai_memeff.hosts.deploy import require_deploy_reads


class SpleenApp(Application):
    """DICOM folder -> series -> volume -> bundle with the overlay halo_inference -> DICOM SEG."""

    def compose(self) -> None:
        """Join the operators."""
        context: AppContext = Application.init_app_context(self.argv)
        source, target = Path(context.input_path), Path(context.output_path)
        require_deploy_reads(source)  # the SDK's reader changes some series without a word
        loader = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=source, name="loader")
        selector = DICOMSeriesSelectorOperator(self, rules="", name="selector")
        volume = DICOMSeriesToVolumeOperator(self, name="volume")
        bundle = MonaiBundleInferenceOperator(
            self,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            app_context=context,  # has no model: -m would put the SDK's wrapper in the place of the bundle's network
            bundle_path=Path(os.environ["BUNDLE"]).absolute(),
            bundle_config_names=BundleConfigNames(config_names=["inference", "halo_inference"]),
            name="bundle",
        )
        segment = SegmentDescription(
            segment_label="Spleen",
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Spleen,
            algorithm_name="spleen_ct_segmentation with halo_inference",
            algorithm_family=codes.DCM.ArtificialIntelligence,
            algorithm_version="0.5.9",
        )
        writer = DICOMSegmentationWriterOperator(
            self, segment_descriptions=[segment], output_folder=target, name="writer"
        )
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, volume, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(volume, bundle, {("image", "image")})
        self.add_flow(selector, writer, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(bundle, writer, {("pred", "seg_image")})


if __name__ == "__main__":
    with exit_in_one_line("deploy_app"):
        SpleenApp().run()
