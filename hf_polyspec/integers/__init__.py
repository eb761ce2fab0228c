# SPDX-License-Identifier: Apache-2.0
"""Matrices of integers: what one is, how it lies in a checkpoint, and the layer that holds one."""
