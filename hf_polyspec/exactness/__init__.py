# SPDX-License-Identifier: Apache-2.0
"""The laws, on tensors and lists alone: no model, no cache, nothing of transformers but its logits processors."""
