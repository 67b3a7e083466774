# SPDX-License-Identifier: Apache-2.0
"""`python -m dessilbi`."""

from dessilbi.cli import main

if __name__ == "__main__":
    main()
