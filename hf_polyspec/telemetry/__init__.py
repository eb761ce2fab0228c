# SPDX-License-Identifier: Apache-2.0
"""Counters of what every level did, and how they are shown."""
