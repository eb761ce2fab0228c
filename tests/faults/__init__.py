# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose: kills, interrupts, full disks, torn files, rival writers, memory with guard pages around it.

`interrupts` and `children` inject, `torn` cuts, `guards` fences memory in; each knows nothing of what it is used on.
`workloads` says what must hold of this package's files, `answers` of a caller's cache, `passes` of compiled functions;
`rounds` puts a seeded round together. The tests run one bounded round; `python -m tests.faults --rounds N` runs longer
ones and counts.
"""
