"""Command line: `python -m data_prep.synthetic --out DIR` writes a made-up HLS granule."""

import argparse
import re
from pathlib import Path

from data_prep.synthetic.granule import write_scene


def parse_size(text: str) -> tuple[int, int]:
    """Return (H, W) from a text such as `460x700`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, such as 460x700, but found {text!r}")
    return int(match[1]), int(match[2])


def main(argv: list[str] | None = None) -> None:
    """Write the granule and print its folder."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.synthetic", description="Write a made-up HLS granule.")
    parser.add_argument("--out", type=Path, required=True, help="folder that takes the granule's folder")
    parser.add_argument("--size", type=parse_size, default=(460, 700), help="HEIGHTxWIDTH in pixels of 30 m (460x700)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another land (0)")
    args = parser.parse_args(argv)
    try:
        print(write_scene(args.out, shape=args.size, seed=args.seed))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
