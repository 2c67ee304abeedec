"""What the helper's interpreter runs: `python -I -S FILE DESCRIPTOR...`, this file by its path.

Isolated and without site-packages: the helper needs nothing but this package and Python's own.
"""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/", 3)[0])
    from streamer.privilege.helper import main

    sys.exit(main(int(sys.argv[1]), [int(one) for one in sys.argv[2:]]))
