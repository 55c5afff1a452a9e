"""``python -m certify``: the same as the ``certify`` command."""

from certify.sibling_packages import claim

if __name__ == "__main__":
    claim()  # -m puts the current folder first
    from certify.cli import main

    main()
