# SPDX-License-Identifier: Apache-2.0
"""The package's version, below everything that writes it down."""

__version__ = "0.2.0"
