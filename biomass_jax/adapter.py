"""Adapters: bundles that hold low-rank updates of another bundle's weights, and by which they find it again."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from biomass_jax.errors import BundleError
from biomass_jax.models.lora import TARGETS, Lora
from biomass_jax.trees import flatten, read_meta


def shared(variables: dict[str, Any]) -> dict[str, Any]:
    """By path, what an adapter takes from its base's variables: the encoder's weights."""
    return {path: leaf for path, leaf in flatten(variables).items() if path.startswith("params/encoder/")}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What makes a bundle an adapter of another one, its base.

    Attributes:
        base: the base's folder.
        base_sha256: of its weights.
        kept: paths of the weights that stay the base's, and aren't written again.
        lora: the updates.
    """

    base: Path
    base_sha256: str
    kept: frozenset[str]
    lora: Lora

    @classmethod
    def of(cls, base: Path, base_sha256: str, variables: dict[str, Any], lora: Lora) -> "Adapter":
        """Updates of the encoder of a base with these variables; decoder and head are the adapter's own."""
        return cls(base, base_sha256, frozenset(shared(variables)), lora)

    def section(self, folder: Path) -> dict[str, Any]:
        """Of `bundle.json` of the adapter in a folder, from which the base is found again."""
        base = {"path": str(self.base.absolute()), "weights_sha256": self.base_sha256}
        with contextlib.suppress(ValueError):  # on another drive
            base["relative"] = os.path.relpath(self.base, folder)
        known = {"rank": self.lora.rank, "alpha": self.lora.alpha, "targets": list(self.lora.targets)}
        return {"base": base, **known}


def lora_of(path: str | os.PathLike[str], section: dict[str, Any]) -> Lora:
    """The updates that an adapter's `bundle.json` describes.

    Raises:
        BundleError: a section that doesn't.
    """
    try:
        sha256, base = section["base"]["weights_sha256"], section["base"]["path"]
        found = Lora(int(section["rank"]), float(section["alpha"]), tuple(section["targets"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: field `adapter` of bundle.json is damaged: {error!r}") from error
    if found.rank < 1 or not set(found.targets) <= set(TARGETS) or not isinstance(base, str) or len(sha256) != 64:
        raise BundleError(f"{path}: field `adapter` of bundle.json is damaged: {section}")
    return found


def check_base(path: str | os.PathLike[str], meta: dict[str, Any], base: Path, base_sha256: str) -> None:
    """Refuse what is no adapter of a base.

    Args:
        path: of the adapter.
        meta: its `bundle.json`.
        base: folder of the base.
        base_sha256: of its weights.

    Raises:
        BundleError: what was found.
    """
    if "adapter" not in meta:
        raise BundleError(f"{path}: is a whole model; expected an adapter of {base}")
    lora_of(path, meta["adapter"])
    known = meta["adapter"]["base"]
    if known["weights_sha256"] != base_sha256:
        raise BundleError(
            f"{path}: is an adapter of {known['path']}, whose weights have the SHA-256 {known['weights_sha256']}; "
            f"those of {base} have {base_sha256}"
        )


def find_base(
    path: str | os.PathLike[str], section: dict[str, Any], given: str | os.PathLike[str] | None = None
) -> Path:
    """The folder of an adapter's base: the one that is given, else by its place beside the adapter, else as it was.

    Raises:
        BundleError: none of them holds a bundle of those weights.
    """
    lora_of(path, section)
    known = section["base"]
    places = [Path(known["path"])]
    if "relative" in known:
        places.insert(0, Path(os.path.normpath(Path(path) / known["relative"])))
    told = []
    for place in [Path(given)] if given is not None else dict.fromkeys(places):
        if not (place / "bundle.json").is_file():
            told.append(f"{place} is no bundle")
        elif (found := read_meta(place)["weights_sha256"]) != known["weights_sha256"]:
            told.append(f"the weights of {place} have {found}")
        else:
            return place
    raise BundleError(
        f"{path}: is an adapter of a model whose weights have the SHA-256 {known['weights_sha256']}, but "
        f"{', and '.join(told)}; tell where that model lies (base)"
    )
