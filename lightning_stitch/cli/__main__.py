"""`python -m lightning_stitch.cli` is `lightning-stitch`."""

from lightning_stitch.cli.main import main

if __name__ == "__main__":
    main()
