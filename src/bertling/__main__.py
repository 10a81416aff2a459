"""`python -m bertling`, also the target of torchrun."""

from bertling.cli import main

main()
