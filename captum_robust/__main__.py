"""``python -m captum_robust``: the command line, as ``torchrun -m`` needs it."""

from captum_robust.cli import main

if __name__ == "__main__":
    main()
