"""Write the miniature world: `python -m data_prep.miniature --out DIR`. About 2 s."""

import argparse
from pathlib import Path

from data_prep.files import run_command
from data_prep.miniature import world


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.miniature", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demonstrations", type=int, default=38400, help="a multiple of 4")
    parser.add_argument("--train", type=int, default=768, help="prompts to align on; a multiple of 3")
    parser.add_argument("--heldout", type=int, default=240, help="prompts for the likelihood trend; likewise")
    parser.add_argument("--test", type=int, default=300, help="prompts for the final evaluation; likewise")
    args = parser.parse_args()
    built = world.build(
        args.out,
        args.seed,
        n_demonstrations=args.demonstrations,
        n_train=args.train,
        n_heldout=args.heldout,
        n_test=args.test,
    )
    print(f"{args.out}: {'written' if built else 'up to date, nothing to do'}")


if __name__ == "__main__":
    run_command(main)
