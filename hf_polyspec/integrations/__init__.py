# SPDX-License-Identifier: Apache-2.0
"""Other programs' doors: an OpenAI server, evaluation harnesses, other engines. Each needs packages of its own."""
