# SPDX-License-Identifier: Apache-2.0
"""What the tests of training train on."""

import pytest

from small_run import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with a tokenizer, text.jsonl and chats.jsonl."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder
