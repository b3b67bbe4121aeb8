"""`biomass-jax merge`: an adapter and its base as one plain bundle, which needs neither."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from biomass_jax import bundle
from biomass_jax.errors import BundleError
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local
from biomass_jax.runtime.lock import writer_beside


def merge(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    command: str = "biomass_jax.convert.merge.merge",
) -> Path:
    """Write the whole model of an adapter as a bundle; adapter and base stay as they are.

    Args:
        adapter: its folder.
        output: the folder to make.
        base: folder of the adapter's base, where it doesn't lie where it did.
        overwrite: replace a bundle that is there.
        command: for the provenance.

    Raises:
        BundleError: no adapter, a base that isn't found, weights that aren't those that the adapter was written with,
            or the folder exists.
    """
    meta = bundle.read_meta(adapter)
    if "adapter" not in meta:
        raise BundleError(f"{adapter}: is a whole model and no adapter; nothing is to be merged")
    whole = bundle.load(adapter, base=base)
    if (found := bundle.weights_sha256(whole.variables)) != whole.weights_sha256:
        raise BundleError(
            f"{adapter}: merged, the weights' SHA-256 is {found}, bundle.json says {whole.weights_sha256}; the arrays "
            "of the adapter or of its base are damaged"
        )
    about = {name: whole.meta[name] for name in ("task", "architecture", "input", "output", "training")}
    origin = {"adapter": str(adapter), "base_sha256": meta["adapter"]["base"]["weights_sha256"], "merged_by": command}
    provenance = whole.meta["provenance"] | origin
    return bundle.save(output, whole.variables, **about, provenance=provenance, overwrite=overwrite)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.convert.merge",
        description="An adapter and its base as one plain bundle, which needs neither.",
        allow_abbrev=False,
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, as training wrote it")
    parser.add_argument("--base", metavar="DIR", help="its base, where that doesn't lie where it did")
    parser.add_argument("--output", required=True, metavar="DIR", help="the bundle, a folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    try:
        environment.settle()
        for value, flag in ((args.adapter, "--adapter"), (args.base, "--base"), (args.output, "--output")):
            check_local(value, flag)
        with writer_beside(Path(args.output)):
            command = shlex.join(["biomass-jax", "merge", *words])
            made = merge(args.adapter, args.output, base=args.base, overwrite=args.overwrite, command=command)
    except Exception as error:
        return environment.failed(error)
    print(f"{made}: a plain bundle, weights {bundle.read_meta(made)['weights_sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
