"""`python -m headwater`."""

from headwater._cli import main

main()
