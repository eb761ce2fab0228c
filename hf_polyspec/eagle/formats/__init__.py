# SPDX-License-Identifier: Apache-2.0
"""The layouts in which EAGLE heads are published, read and written."""
