# SPDX-License-Identifier: Apache-2.0
"""Files that outlive a kill: whole or absent, one writer a folder, and damage that is named.

What the rest of the package writes goes through here:

- `atomic`: one file, there whole or as it was before.
- `folders`: several files that make sense together only, the one that marks them as whole last.
- `lines`: a file that grows by lines; half a last line is what a kill leaves, and is dropped.
- `reading`: what cannot be read is a `DamagedFileError`, which names the file and says what to do.
- `locks`: one writer a folder.
"""
