# SPDX-License-Identifier: Apache-2.0
"""Which chain is fastest here, and why: formulas, measurements, and the choice between chains.

Nothing is imported here, so that a caller who only wants the formulas pays for nothing else; the formulas
are in :mod:`hf_polyspec.planning.theory`.
"""
