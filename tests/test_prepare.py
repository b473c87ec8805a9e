"""From a dataset to training data: what is left out, split, masked and held out, and the notes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from csm_studio.audio.io import write_wav
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.constants import MAX_CONTEXT_FRAMES
from csm_studio.dataset.records import Clip, Dataset
from csm_studio.errors import DatasetError
from csm_studio.models.csm import Companions
from csm_studio.training.config import LoRAOptions
from csm_studio.training.prepare import TrainingData, prepare_data
from tests.tiny_voice import make_voice


@pytest.fixture
def companions(tiny_csm_config: CSMConfig, tiny_mimi_config: MimiConfig) -> Companions:
    made = make_voice(tiny_csm_config, tiny_mimi_config).companions
    assert made is not None
    return made


@dataclasses.dataclass
class Recordings:
    """Writes clips of noise and prepares datasets of them."""

    folder: Path
    companions: Companions

    def clip(self, duration_s: float, speaker: int = 0, text: str = "Some words.") -> Clip:
        path = self.folder / f"clip_{duration_s}_{speaker}_{len(list(self.folder.iterdir()))}.wav"
        rng = np.random.default_rng(round(duration_s * 1000))
        write_wav(path, rng.normal(0, 0.1, round(duration_s * 24_000)).astype(np.float32))
        return Clip(text, path, speaker)

    def prepare(self, *conversations: list[Clip], **settings: object) -> TrainingData:
        options = LoRAOptions(
            data_path=Path("d.json"),
            cache_dir=self.folder / "cache",
            **{"val_split": 0.0, **settings},  # type: ignore[arg-type]
        )
        dataset = Dataset(None, tuple(tuple(turns) for turns in conversations))
        return prepare_data(dataset, self.companions, options)


@pytest.fixture
def recordings(tmp_path: Path, companions: Companions) -> Recordings:
    return Recordings(tmp_path, companions)


def test_long_clips_are_left_out_with_a_note(recordings: Recordings) -> None:
    short, exact, long = recordings.clip(0.5), recordings.clip(1.0), recordings.clip(1.2)
    data = recordings.prepare([short], [long], [exact], max_audio_length_ms=1000)
    assert len(data.train) == 2
    # No clip is cut: each keeps all its frames and its end.
    assert [example.num_targets for example in data.train] == [7 + 1, 13 + 1]
    assert len(data.notes) == 1
    assert data.notes[0].startswith(long.audio_path.name)
    assert "is over --max-audio-length-ms 1000" in data.notes[0]


def test_long_conversation_is_cut_between_turns(recordings: Recordings) -> None:
    text = "word " * 140  # 700 frames of text a turn
    turns = [recordings.clip(0.3 + i / 10, text=text) for i in range(5)]
    data = recordings.prepare(turns)
    assert [len(example.turns) for example in data.train] == [2, 2, 1]
    assert all(example.num_frames <= MAX_CONTEXT_FRAMES for example in data.train)
    assert sum("begins a new conversation" in note for note in data.notes) == 2


def test_masked_speakers_are_context_only(recordings: Recordings) -> None:
    question, answer = recordings.clip(0.4, speaker=1), recordings.clip(0.6, speaker=0)
    alone = recordings.clip(0.5, speaker=1)
    data = recordings.prepare([question, answer], [alone], mask_speaker_ids=[1, 9])
    assert len(data.train) == 1
    assert [turn.scored for turn in data.train[0].turns] == [False, True]
    assert any("1 conversations left out" in note for note in data.notes)
    assert any("no clip has speaker 9" in note for note in data.notes)


def test_nothing_left_is_an_error(recordings: Recordings) -> None:
    clip = recordings.clip(1.0)
    with pytest.raises(DatasetError, match=r"nothing is left to train on(.|\n)*is over"):
        recordings.prepare([clip], max_audio_length_ms=500)


def test_validation_is_held_out_by_the_seed(recordings: Recordings) -> None:
    conversations = [[recordings.clip(0.3, text=f"Number {i}.")] for i in range(12)]
    data = recordings.prepare(*conversations, val_split=0.25)
    assert (len(data.train), len(data.validation)) == (9, 3)
    texts = [tuple(e.turns[0].text_ids) for e in (*data.train, *data.validation)]
    assert len(set(texts)) == 12
    again = recordings.prepare(*conversations, val_split=0.25)
    other = recordings.prepare(*conversations, val_split=0.25, seed=1)
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_codes_are_cached_per_codec(
    recordings: Recordings, tiny_csm_config: CSMConfig, tiny_mimi_config: MimiConfig
) -> None:
    clip = recordings.clip(0.9)
    first = recordings.prepare([clip])
    entries = set((recordings.folder / "cache").rglob("*.npz"))
    assert recordings.prepare([clip]).fingerprint == first.fingerprint
    assert set((recordings.folder / "cache").rglob("*.npz")) == entries
    stranger = make_voice(tiny_csm_config, tiny_mimi_config, seed=5).companions
    assert stranger is not None
    other = Recordings(recordings.folder, stranger).prepare([clip])
    assert other.fingerprint != first.fingerprint
    assert len(set((recordings.folder / "cache").rglob("*.npz"))) == 2
