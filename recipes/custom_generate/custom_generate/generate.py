# SPDX-License-Identifier: Apache-2.0
"""Hub recipe: `model.generate(custom_generate="<this repository or folder>", trust_remote_code=True, ...)`.

transformers hands over everything given to generate(), prepared by nobody; this passes it on to the package.
"""

from typing import Any

import hf_polyspec

# Meant for the Hub download, not for generation; transformers forwards them all the same.
HUB_ARGUMENTS = ("revision", "token", "code_revision", "cache_dir", "force_download", "local_files_only", "subfolder")


def generate(model: Any, **arguments: Any) -> Any:
    """Polybasic speculative decoding with `assistant_models=[...]`; plain generation without them."""
    for name in HUB_ARGUMENTS:
        arguments.pop(name, None)
    # Without assistant_models, those of a generation config are used.
    return hf_polyspec.generate(model, **{name: value for name, value in arguments.items() if value is not None})
