"""The command `memeff`: parse, call, print; every bad input ends in one line and exit status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monai_memeff.errors import INTERRUPTED, InputError, exit_in_one_line, refuse_together

# torch takes seconds to load: every command imports what it needs itself
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
bundle = typer.Typer(help="List the bundles that come with the package, or copy one to work in it.")
app.add_typer(bundle, name="bundle")


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Memory-efficient 3D models for MONAI and nnU-Net pipelines."""
    if version:
        from monai_memeff import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    image: Annotated[
        Path | None,
        typer.Option(help="Head CT (--systems: any CT or MRI): NIfTI, NRRD or a DICOM folder. Default: generated."),
    ] = None,
    systems: Annotated[
        bool, typer.Option("--systems", help="Compare dense, sparse, occupancy, clstm and halo on one scan.")
    ] = False,
    label: Annotated[Path | None, typer.Option(help="With --systems: labels on the image's grid.")] = None,
    defective: Annotated[
        bool, typer.Option("--defective", help="The head has a real hole: find it and fill it. Needs --image.")
    ] = False,
    smallest_cm2: Annotated[
        float | None, typer.Option(help="With --defective: the smallest hole. Default: 4; less finds slits too.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Edge of the grid in voxels: 64 to 512, a multiple of 16. Default: 64.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report, the implant and the pictures.")] = Path(
        "memeff_demo"
    ),
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Training of each network. Default: 95 (--defective: 240) at size 64, 8 times that at 128;"
            " --systems: at most 75."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Bone is above this value. Default: 300, of a CT in Hounsfield units; --systems, MRI: Otsu's."
        ),
    ] = None,
    defects: Annotated[
        int | None, typer.Option(help="Defects to test on, cut into the head's bone. Default: 6.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of defects and weights.", min=0, max=2**32 - 1)] = 0,
    series: Annotated[str | None, typer.Option(help="SeriesInstanceUID, where a DICOM folder holds several.")] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Interpolate DICOM slices that are uneven, missing or tilted.")
    ] = False,
) -> None:
    """Complete a skull: train a sparse network on random defects of one head, then fill defects it has not seen.

    --defective fills the hole of a head that has one; --systems compares dense, sparse, occupancy, clstm and halo.
    """
    if systems:
        refuse_together(
            "--systems",
            {"--defective": defective, "--size": size, "--defects": defects, "--smallest-cm2": smallest_cm2},
        )
        from monai_memeff.apps.systems.run import run_systems

        return run_systems(image, label, output, seconds, threshold, seed, series, resample)
    refuse_together("a demo without --systems", {"--label": label})
    from monai_memeff.apps.skull.demo.options import SkullOptions

    options = SkullOptions(output, image, size, seconds, threshold, defects, seed, series, resample)
    if defective:
        from monai_memeff.apps.skull.demo.real.run import run_defective

        return run_defective(options, smallest_cm2)
    refuse_together("a demo without --defective", {"--smallest-cm2": smallest_cm2})
    from monai_memeff.apps.skull.demo.run import run_demo

    run_demo(options)


@app.command()
def overlay(
    name: Annotated[str | None, typer.Argument(help="Name of an overlay; none lists them.", metavar="NAME")] = None,
) -> None:
    """Print the path of a configuration overlay that switches a stock MONAI bundle to a memory-efficient model."""
    from monai_memeff.overlays import overlay_names, overlay_path

    for line in overlay_names() if name is None else [overlay_path(name)]:
        typer.echo(line)


@bundle.callback(invoke_without_command=True)
def bundles(context: typer.Context) -> None:
    """List the bundles that come with the package, or copy one to work in it."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bundle.command("list")
def list_bundles() -> None:
    """Name the bundles, and say in one line what each is for."""
    from monai_memeff.bundles import bundle_names, bundle_task

    for name in bundle_names():
        typer.echo(f"{name:30} {bundle_task(name)}")


@bundle.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="Name of a bundle: see `memeff bundle list`.", metavar="NAME")],
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the copy.", metavar="DIR")],
) -> None:
    """Copy a bundle with all its files into a new folder."""
    from monai_memeff.bundles import copy_bundle

    target = copy_bundle(name, folder)
    typer.echo(f"copied {name} to {folder}: {target / 'docs' / 'README.md'} says how to run it")


@app.command()
def merge(
    configs: Annotated[
        list[Path], typer.Argument(help="Configuration files, in the order MONAI would read them.", metavar="CONFIG...")
    ],
    output: Annotated[
        Path,
        typer.Option(help="Where to write the merged configuration (.json or .yaml); for a host: its bundle folder."),
    ],
    host: Annotated[str | None, typer.Option(help="label: write it where MONAI Label looks for it.")] = None,
) -> None:
    """Merge a bundle's configuration with overlays into one file, for hosts that read only one (MONAI Label)."""
    from monai_memeff.hosts.write import write_merged

    for line in write_merged(configs, output, host):
        typer.echo(line)


@app.command("run")
def run_bundle(
    folder: Annotated[Path, typer.Argument(help="Folder of a MONAI bundle with its weights.", metavar="BUNDLE_DIR")],
    inputs: Annotated[
        list[Path], typer.Argument(help="DICOM series, folders of them, NIfTI or NRRD files.", metavar="INPUT...")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the results: one folder for each study.")],
    overlay: Annotated[list[str] | None, typer.Option(help="Overlay to merge: see `memeff overlay`.")] = None,
    format: Annotated[
        str | None, typer.Option(help="seg (DICOM SEG) or nifti. Default: seg for DICOM, nifti for the rest.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes, each with the bundle loaded.")] = 1,
    series: Annotated[str | None, typer.Option(help="SeriesInstanceUID, where a DICOM folder holds several.")] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Interpolate DICOM slices that are uneven, missing or tilted.")
    ] = False,
    part: Annotated[str | None, typer.Option(help="I/N: every Nth study from number I on, for many machines.")] = None,
) -> int:
    """Run studies through a MONAI bundle: DICOM SEG or NIfTI out, and a report for each; run again, it goes on."""
    from monai_memeff.hosts.run import run_studies

    return run_studies(folder, inputs, output, overlay or (), format, workers, series, resample, part)


@app.command()
def certify(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a MONAI bundle or a trained nnU-Net model, or MODULE:FUNCTION that returns a network.",
            metavar="MODEL",
        ),
    ],
    image: Annotated[
        list[Path], typer.Option(help="Volume or DICOM folder; once for each image that the model reads, in its order.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for certificate.html and certificate.json.")],
    label: Annotated[
        list[Path] | None, typer.Option(help="True labels on the image's grid; where segments overlap, one file each.")
    ] = None,
    partitions: Annotated[int | None, typer.Option(help="Parts of the streamed run. Default: 8.")] = None,
    budget: Annotated[str | None, typer.Option(help="Memory for activations instead of parts, such as 2GiB.")] = None,
    repeats: Annotated[int, typer.Option(help="Streamed runs that must be the same to the last bit.")] = 10,
    whole: Annotated[
        bool | None, typer.Option("--whole/--no-whole", help="Run the whole network. Default: where it fits.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Size of the sliding window, such as 96,96,96. Default: the model's own.")
    ] = None,
    fold: Annotated[str | None, typer.Option(help="nnU-Net: the fold to certify. Default: the first.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="MODULE:FUNCTION: channels above it are foreground. Default: arg-max.")
    ] = None,
) -> int:
    """Prove on your own volume that a model streamed in parts gives the labels of the whole: a page to file."""
    from monai_memeff.hosts.certify import certify as run_certify
    from monai_memeff.hosts.certify.sources.subject import Options, window_of

    options = Options(fold, threshold, window_of(window))
    return run_certify(model, image, output, label or (), partitions, budget, repeats, whole, options)


@app.command()
def estimate(
    source: Annotated[
        str, typer.Argument(help="Bundle, its configuration, nnU-Net plans file, or package.Class.", metavar="SOURCE")
    ],
    shape: Annotated[str | None, typer.Option(help="1,1,128,128,128: batch, channels, extents.")] = None,
    budget: Annotated[str | None, typer.Option(help="Such as 8GiB: choose a system, write its overlay.")] = None,
    image: Annotated[Path | None, typer.Option(help="Volume whose active voxels count for sparse.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Voxels above it are active. Default: those not 0.")] = None,
    training: Annotated[bool, typer.Option("--training", help="A step of training instead of inference.")] = False,
    overlay: Annotated[list[str] | None, typer.Option(help="Overlay to compare alone, or a file to merge.")] = None,
    configuration: Annotated[str | None, typer.Option(help="Of a plans file. Default: 3d_fullres.")] = None,
    arguments: Annotated[str | None, typer.Option(help="Keyword arguments of package.Class, as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    output: Annotated[Path | None, typer.Option(help="For the overlay. Default: memeff_SYSTEM.json here.")] = None,
) -> None:
    """Predict the memory of a network before it runs, in every system; with a budget, choose one and its overlay."""
    from monai_memeff.hosts.estimate import run_estimate

    options = (shape, budget, image, threshold, training, overlay or (), configuration, arguments, device, output)
    typer.echo(run_estimate(source, *options).text(json))


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="State dict of the skull network, trained in MinkowskiEngine.", metavar="CHECKPOINT")
    ],
    output: Annotated[
        Path, typer.Argument(help="Where to write the state dict for SparseCompletionNet.", metavar="OUTPUT")
    ],
    channels: Annotated[
        str | None, typer.Option(help="Seven numbers with commas in between. Default: those of the checkpoint.")
    ] = None,
) -> None:
    """Convert a MinkowskiEngine checkpoint of the completion network; MinkowskiEngine itself is not needed."""
    from monai_memeff.hosts.convert import write_converted

    typer.echo(write_converted(checkpoint, output, channels))


@app.command()
def doctor() -> None:
    """Say what is installed and which sparse engines can be used here."""
    from monai_memeff.hosts.doctor import findings

    for line in findings():
        typer.echo(line)


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit status 2."""
    with exit_in_one_line("memeff"):
        status = _run()
        if status == INTERRUPTED:
            raise KeyboardInterrupt
    raise SystemExit(status)


def _run() -> int:
    """Parse and call; what the parser refuses is bad input like any other."""
    try:
        return app(prog_name="memeff", standalone_mode=False) or 0
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # of the parser's exceptions, whose module differs by version
            raise
        raise InputError(f"{error.format_message().rstrip('.')}: see memeff --help") from None
