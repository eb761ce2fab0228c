# SPDX-License-Identifier: Apache-2.0
"""Measurements whose figures stand in README and docs, each made by one command."""
