# SPDX-License-Identifier: Apache-2.0
"""Layouts and passes for CPUs: optional, imported only where one is asked for."""
