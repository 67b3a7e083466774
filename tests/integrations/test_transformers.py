# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models and trainers: heads and neurons are selected, resumed and removed.

Tiny models with random weights; nothing is downloaded.
"""

import copy
import warnings
from math import inf

import pytest
import torch

from dessilbi import (
    DessiLBI,
    Path,
    close,
    compact,
    load_compact,
    param_groups,
    plan,
    save_compact,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say of each other at import
    transformers = pytest.importorskip("transformers")

from selecting import halve, unlike

from dessilbi.integrations.transformers import PathCallback, optimizer_cls_and_kwargs

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def bert():
    config = transformers.BertConfig(
        vocab_size=50, intermediate_size=24, max_position_embeddings=16, num_labels=3, **SHAPE
    )
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        intermediate_size=24, image_size=16, patch_size=8, num_labels=3, **SHAPE
    )
    return transformers.ViTForImageClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        n_positions=16, n_embd=32, n_layer=1, n_head=4, n_inner=24, use_cache=False, **TEXT
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        use_cache=False,
        **TEXT,
        **SHAPE,
    )
    return transformers.LlamaForCausalLM(config)


# The model, what it reads, the tensors of a head and its structures, those of a neuron.
CASES = {
    "bert": (bert, {"input_ids": IDS}, dict.fromkeys(("query", "key", "value"), "head:8"), 1),
    "vit": (
        vit,
        {"pixel_values": IMAGES},
        dict.fromkeys(("q_proj", "k_proj", "v_proj"), "head:8"),
        1,
    ),
    "gpt2": (gpt2, {"input_ids": IDS}, {"c_attn": (None, (8, 8, 8))}, 1),
    "llama": (
        llama,
        {"input_ids": IDS},
        {"q_proj": "head:16", "k_proj": "head:8", "v_proj": "head:8"},
        2,
    ),
}


def make(name):
    torch.manual_seed(0)
    return CASES[name][0]()


def step(model, optimizer, inputs):
    optimizer.zero_grad()
    logits = model(**inputs).logits
    logits = logits.reshape(-1, logits.shape[-1])
    torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    optimizer.step()


class Trained:
    """A model trained some steps, what was planned for it, and its path."""

    def __init__(self, name):
        self.name, self.inputs, self.model = name, CASES[name][1], make(name).eval()
        self.plan = plan(self.model, example_inputs=self.inputs)
        groups = param_groups(
            self.model, self.plan.rules({"head": {}, "neuron": {}}), example_inputs=self.inputs
        )
        self.groups = {n: g for g in groups for n, _ in g["params"]}
        self.optimizer = DessiLBI(groups, lr=0.1, nu=1.0, lam=inf)
        unlike(self.optimizer)
        self.path = Path(self.optimizer, every=1)
        for number in range(8):
            step(self.model, self.optimizer, self.inputs)
            if number == 6:  # lambda does not matter before the first block enters
                halve(self.optimizer)
        (self.heads,) = [unit for unit in self.plan.units if unit.kind == "head"]
        self.neurons = [unit for unit in self.plan.units if unit.kind == "neuron"]


@pytest.fixture(scope="module", params=CASES)
def trained(request):
    return Trained(request.param)


def test_the_plan_names_heads_and_neurons(trained):
    _, _, heads, num_neurons = CASES[trained.name]
    assert [name.split(".")[-2] for name in trained.heads.producers] == list(heads)
    assert trained.heads.num_blocks == (2 if trained.name == "llama" else 4)
    assert len(trained.neurons[0].producers) == num_neurons
    assert trained.neurons[0].num_blocks == 24
    assert "(heads)" in str(trained.plan)
    assert "(neurons" in str(trained.plan)
    if trained.name == "llama":
        (width,) = [unit for unit in trained.plan.units if unit.kind == "width"]
        assert all(trained.groups[name]["structure"] is None for name in width.producers)


def test_a_head_is_one_block_of_all_that_makes_it(trained):
    _, _, heads, _ = CASES[trained.name]
    groups = [trained.groups[name] for name in trained.heads.producers]
    assert [group["structure"] for group in groups] == list(heads.values())
    assert {group["unit"] for group in groups} == {trained.heads.name}
    support = trained.optimizer.support()
    alive = [support[name].reshape(-1) for name in trained.heads.producers]
    assert all(torch.equal(mask, alive[0]) for mask in alive)
    assert 0 < int(alive[0].sum()) < len(alive[0])


def test_dead_heads_and_neurons_really_go_and_stay_so_in_a_file(trained, tmp_path):
    ticket = trained.path.ticket(step=8)
    heads = int(ticket[trained.heads.name].sum())
    neurons = int(ticket[trained.neurons[0].name].sum())
    assert 0 < heads < trained.heads.num_blocks
    assert 0 < neurons < 24
    trained.path.close()
    closed = close(ticket, trained.model, example_inputs=trained.inputs)
    small = compact(
        trained.model, closed, example_inputs=trained.inputs, optimizer=trained.optimizer
    )
    assert type(small.model) is type(trained.model)
    assert small.proof.relative_diff < 1e-9
    shapes = {name: tuple(p.shape) for name, p in small.model.named_parameters()}
    size = {"gpt2": 24 * heads, "llama": 16 * heads}.get(trained.name, 8 * heads)
    assert size in shapes[trained.heads.name]
    assert neurons in shapes[trained.neurons[0].name]
    with torch.no_grad():
        expected = ticket_applied(trained.model, closed)(**trained.inputs).logits
        assert torch.allclose(small.model(**trained.inputs).logits, expected, atol=1e-5)
    folder = save_compact(small, tmp_path / "small")
    again = load_compact(lambda: make(trained.name), folder)
    with torch.no_grad():
        assert torch.equal(again(**trained.inputs).logits, small.model(**trained.inputs).logits)
    step(small.model, small.optimizer, trained.inputs)


def ticket_applied(model, ticket):
    return ticket.apply_(copy.deepcopy(model))


def test_heads_that_share_keys_and_values_live_and_die_together(trained):
    if trained.name != "llama":
        return
    gamma = trained.optimizer.gamma()
    alive = [gamma[name].reshape(2, -1).ne(0).any(1) for name in trained.heads.producers]
    assert alive[0].tolist() == alive[1].tolist() == alive[2].tolist()


def test_a_kind_that_the_model_does_not_have_is_refused(trained):
    with pytest.raises(ValueError, match="has no units of kind 'filter': it has 'head', 'neuron'"):
        trained.plan.rules({"filter": {}})


def data(name):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(40):
        label = torch.randint(0, 3, (), generator=generator)
        if name == "bert":
            found.append({"input_ids": torch.randint(0, 50, (7,), generator=generator)})
        else:
            found.append({"pixel_values": torch.randn(3, 16, 16, generator=generator)})
        found[-1]["labels"] = label
    return found


def trainer(folder, name, rules, callback=None, *, data_collator=None, **options):
    model = make(name)
    usual = {"max_steps": 12, "save_steps": 6, "logging_strategy": "no"}
    args = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **usual | {"per_device_train_batch_size": 4} | options,
    )
    return transformers.Trainer(
        model=model,
        args=args,
        train_dataset=data(name),
        eval_dataset=data(name)[:8],
        data_collator=data_collator,
        callbacks=[callback] if callback else [],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(
            model, rules, lr=0.1, nu=1.0, momentum=0.9
        ),
    )


RULES = {
    "bert": {
        "*.self.*.weight": {"structure": "head:8", "unit": "heads", "lam": 0.22},
        "*.intermediate.dense.weight": {"structure": "neuron", "lam": 0.055},
        "*": None,
    },
    "vit": {
        "*.[qkv]_proj.weight": {"structure": "head:8", "unit": "heads", "lam": 0.22},
        "*.fc1.weight": {"structure": "neuron", "lam": 0.055},
        "*": None,
    },
}


@pytest.fixture(scope="module", params=RULES)
def whole(request, tmp_path_factory):
    """A training of 12 steps in the Trainer of transformers, with a checkpoint at step 6."""
    folder = tmp_path_factory.mktemp(request.param)
    callback = PathCallback(every=2)
    made = trainer(folder, request.param, RULES[request.param], callback)
    made.train()
    return request.param, folder, made, callback


def test_the_trainer_records_the_path(whole):
    _, folder, _, callback = whole
    path = Path.load(folder)
    assert [point.step for point in path.points] == [2, 4, 6, 8, 10, 12]
    assert path.points == callback.path.points
    assert path.ticket(density=0.5) == callback.path.ticket(density=0.5)
    assert 0 < path.points[-1].density < 1


@pytest.mark.parametrize("moved", [False, True], ids=["same folder", "another folder"])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(whole, moved, tmp_path):
    name, folder, made, _ = whole
    if name == "vit":
        pytest.skip("this Trainer saves a ViT under names that it does not find when it resumes")
    if not moved:
        tmp_path.joinpath("path.jsonl").write_bytes((folder / "path.jsonl").read_bytes())
    other = trainer(tmp_path, name, RULES[name], PathCallback(every=2))
    other.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    state, theirs = (t.optimizer.optimizer.state_dict()["state"] for t in (made, other))
    for key, values in state.items():
        assert values.keys() == theirs[key].keys()
        assert all(torch.equal(values[name], theirs[key][name]) for name in values)
    for key, weight in made.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], weight)
    assert (tmp_path / "path.jsonl").read_bytes() == (folder / "path.jsonl").read_bytes()


def test_a_checkpoint_made_without_the_callback_is_refused_with_it(tmp_path):
    trainer(tmp_path / "without", "bert", RULES["bert"]).train()
    other = trainer(tmp_path / "with", "bert", RULES["bert"], PathCallback())
    with pytest.raises(ValueError, match="step 6 was made without PathCallback"):
        other.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-6"))


def test_training_again_does_not_overwrite_the_path(tmp_path):
    callback = PathCallback(every=2)
    made = trainer(tmp_path, "bert", RULES["bert"], callback, save_strategy="no")
    made.train()
    before = (tmp_path / "path.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="give the callback another folder, or resume"):
        made.train()
    assert (tmp_path / "path.jsonl").read_bytes() == before
    assert callback.path.step == 12


def test_the_path_goes_on_where_a_training_begins_again_with_a_smaller_batch(tmp_path):
    sizes = []

    def collate(features):
        sizes.append(len(features))
        if len(sizes) == 4:  # after two steps: a batch is fetched ahead
            raise RuntimeError("CUDA out of memory.")
        return transformers.default_data_collator(features)

    callback = PathCallback(every=2)
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    made = trainer(
        tmp_path,
        "bert",
        RULES["bert"],
        callback,
        data_collator=collate,
        save_strategy="no",
        **options,
    )
    made.train()
    assert sizes[3] > sizes[4]
    assert made.state.global_step == 12
    assert callback.path.step == 14  # the weights took all of these
    assert [point.step for point in Path.load(tmp_path).points] == [2, 4, 6, 8, 10, 12, 14]


def test_the_path_follows_the_schedule_through_accumulation_clipping_and_bf16(tmp_path):
    callback = PathCallback(every=1)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "bf16": True}
    options |= {"lr_scheduler_type": "cosine", "warmup_steps": 3, "save_strategy": "no"}
    options |= {"logging_strategy": "steps", "logging_steps": 1}
    made = trainer(tmp_path, "bert", RULES["bert"], callback, **options)
    made.train()
    logged = [entry for entry in made.state.log_history if "learning_rate" in entry]
    rates = [entry["learning_rate"] for entry in logged]
    assert len(rates) == 12
    assert rates[0] == 0 < rates[1] < rates[3] > rates[-1]
    times = [point.time for point in callback.path.points]
    assert times == pytest.approx([sum(rates[: n + 1]) for n in range(12)])
    assert min(entry["grad_norm"] for entry in logged) > 0.05
    assert 0 < callback.path.points[-1].density < 1
    for state in made.optimizer.optimizer.state.values():
        assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_with_the_best_model_loaded_the_path_is_that_of_the_whole_training(tmp_path):
    callback = PathCallback(every=2)
    options = {"eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True}
    made = trainer(tmp_path, "bert", RULES["bert"], callback, save_total_limit=1, **options)
    made.train()
    assert made.state.best_model_checkpoint
    assert [point.step for point in Path.load(tmp_path).points] == [2, 4, 6, 8, 10, 12]


def test_before_training_there_is_no_path():
    with pytest.raises(ValueError, match=r"made when trainer\.train begins"):
        PathCallback().path  # noqa: B018
