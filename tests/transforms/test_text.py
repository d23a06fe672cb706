"""The hashed sentence vectors keep tasks apart and bring wordings of one task near each other."""

import subprocess
import sys

import numpy as np
import pytest

from lightning_robot.envs.calvin_tasks import PARAPHRASES, SENTENCES
from lightning_robot.transforms.text import SIZE, HashedTextEncoder, SentenceTransformerEncoder


def test_unit_float32_vectors_equal_in_another_process():
    texts = ["Open the drawer!", "", "tür öffnen"]
    vectors = HashedTextEncoder().encode(texts)
    assert vectors.shape == (3, SIZE)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    code = f"from lightning_robot.transforms.text import *; print(HashedTextEncoder().encode({texts!r}).tobytes().hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == vectors.tobytes().hex()
    assert HashedTextEncoder().encode([]).shape == (0, SIZE)
    np.testing.assert_array_equal(vectors[0], HashedTextEncoder().encode(["open  the DRAWER"])[0])


def test_evaluation_sentences_of_different_tasks_are_apart():
    vectors = HashedTextEncoder().encode(list(SENTENCES.values()))
    similarity = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert similarity.max() < 0.85  # 0.81: the light bulb on and off


def test_most_evaluation_sentences_are_nearest_to_a_wording_of_their_own_task():
    encoder = HashedTextEncoder()
    tasks = [task for task, texts in PARAPHRASES.items() for _ in texts]
    wordings = encoder.encode([text for texts in PARAPHRASES.values() for text in texts])
    nearest = [tasks[int(np.argmax(wordings @ vector))] for vector in encoder.encode(list(SENTENCES.values()))]
    right = np.mean([task == found for task, found in zip(SENTENCES, nearest)])
    assert right >= 0.85  # 31 of 34


def test_missing_sentence_model_says_what_to_install():
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'lightning_robot\[calvin\]'"):
            SentenceTransformerEncoder().encode(["x"])
    else:
        pytest.skip("sentence-transformers is installed here")
