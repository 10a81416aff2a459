"""`python -m bertling`, also the target of torchrun."""

from bertling.cli import main

if __name__ == "__main__":
    main()
