# SPDX-License-Identifier: Apache-2.0
"""`polyspec bench`: Spec-Bench questions on any list of methods, in one process, interleaved prompt by prompt."""
