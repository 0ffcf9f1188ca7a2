"""``python -m bench.roofline``."""

from bench.roofline.report import main

if __name__ == "__main__":
    main()
