"""Command line: `python -m data_prep synthetic --out DIR [--world NAME]` writes granules, and orbits over them."""

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


WHO = {
    "one_pixel": "a model of single pixels can't pass",
    "window": "nor one that sees the texture around a pixel",
    "neighbours": "nor one that sees how far the wind reaches",
    "stages": "nor one that sees the river",
    "best": "no model can pass",
    "oracle": "no model can pass",
}


def _print_limits(out: Path, limits: dict[str, dict[str, float]]) -> None:
    print(out / "plan.json")
    for name in (name for name in WHO if name in limits):
        words = "R2 {r2:.3f}, RMSE {rmse:.1f} Mg/ha, R2 of logs {r2_log:.3f}".format(**limits[name])
        print(f"{WHO[name]}: {words}")


def main(argv: list[str] | None = None) -> None:
    """Write one granule and print its folder, or a world of granules and orbits and print where its plan is."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep synthetic", description="Write synthetic HLS granules, and GEDI orbits over them."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that takes what is written")
    parser.add_argument(
        "--world",
        choices=("scene", "ruler", "forest", "context"),
        default="scene",
        help="scene: one granule; ruler: six tiles that tell their rows and columns, with all that has to be dropped; "
        "forest: a tile to learn from; context: one whose biomass a pixel's own colour doesn't tell (scene)",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        help="HEIGHTxWIDTH of a tile in pixels of 30 m (460x700; 900x1120 for a forest or context)",
    )
    parser.add_argument(
        "--heights",
        type=int,
        choices=(2, 3),
        help="of a forest: the version of GEDI L2A files of the same shots, granules/gedi_l2a/ (none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another land (0)")
    args = parser.parse_args(argv)
    if args.heights is not None and args.world != "forest":
        parser.error("--heights goes with --world forest")
    size = {} if args.size is None else {"shape": args.size}
    try:
        # The worlds need the `prep` libraries, which a scene does without.
        if args.world == "ruler":
            from data_prep.synthetic.ruler.world import write_ruler_world

            print(write_ruler_world(args.out, seed=args.seed, **size))
        elif args.world == "forest":
            from data_prep.synthetic.forest.world import write_forest_world

            _print_limits(
                args.out, write_forest_world(args.out, seed=args.seed, heights=args.heights, **size)["limits"]
            )
        elif args.world == "context":
            from data_prep.synthetic.context.world import write_context_world

            _print_limits(args.out, write_context_world(args.out, seed=args.seed, **size)["limits"])
        else:
            print(write_scene(args.out, seed=args.seed, **size))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
