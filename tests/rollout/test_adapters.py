"""Adapters that are published alone: served as the weights they are merged into, or not at all."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from slipstream.buffer.errors import CorruptData
from slipstream.kernels.adapters import BASE, SCALE, merged
from slipstream.kernels.models import ModelError, read_weights
from slipstream.learner import lora


@pytest.mark.parametrize("family", ["llama", "qwen2"])
async def test_an_adapter_is_served_as_the_weights_that_it_is_merged_into(tiny, family):
    folder = tiny.folder(family)
    engine, found = tiny.engine(folder), []
    for seed in (5, 6):  # the second onto the same base
        model = tiny.adapted(folder, seed)
        alone = tiny.publish_adapter(model, seed)
        parameters = lora.adapters(model)
        adapter_bytes = sum(parameter.nbytes for parameter in parameters.values())
        (shard,) = alone.shards
        assert adapter_bytes < shard.num_bytes < adapter_bytes + 200 * len(parameters)
        for manifest in (alone, tiny.publish(tiny.whole(folder, model), 10 * seed)):
            await engine.load(manifest)
            requests = [tiny.request([3, 4, i], i, max_new_tokens=40) for i in range(2, 10)]
            found.append(await tiny.outputs(engine, requests))
        for name, output in found[-2].items():
            same = found[-1][name]
            assert output.token_ids.tolist() == same.token_ids.tolist()
            np.testing.assert_allclose(
                output.behaviour_logprobs, same.behaviour_logprobs, rtol=0, atol=1e-5
            )
    first, second = found[0], found[2]
    assert any(first[n].token_ids.tolist() != second[n].token_ids.tolist() for n in first)


def flip(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[-40] ^= 1
    Path(path).write_bytes(data)


@pytest.mark.parametrize("fault", ["adapter", "base", "other base", "no base"])
async def test_what_is_not_the_adapter_or_not_its_base_is_refused(tiny, fault):
    folder = tiny.folder()
    engine = tiny.engine(folder)
    good = tiny.publish_adapter(tiny.adapted(folder, 5), 1)
    await engine.load(good)
    bad = tiny.publish_adapter(tiny.adapted(folder, 6), 2)
    if fault == "adapter":
        flip(bad.shards[0].path)
    elif fault == "base":  # after it was verified for version 1
        flip(bad.base.path)
    else:
        other = tiny.publish(tiny.policy(folder, 9), 3).shards[0]
        base = other if fault == "other base" else None
        bad = msgspec.structs.replace(bad, base=base)
    with pytest.raises(CorruptData, match="digest" if fault in ("adapter", "base") else "base"):
        await engine.load(bad)
    assert (engine.state, engine.serving) == ("SERVING", good.version)


def test_an_adapter_that_does_not_fit_is_an_error_that_names_the_layer(tiny):
    manifest = tiny.publish_adapter(tiny.adapted(tiny.folder(), 5), 1)
    tensors = read_weights([shard.path for shard in manifest.files])
    name = "model.layers.1.mlp.up_proj"
    plain = {n for n in tensors if ".lora_" not in n and n not in (SCALE, BASE)}
    assert {n for n, _ in merged(tensors)} == plain
    a_RI = tensors[f"{name}.lora_A.weight"]
    for changed, reason in (
        ({f"{name}.lora_A.weight": a_RI[:, 1:]}, "does not fit"),
        ({f"{name}.lora_A.weight": a_RI[1:]}, "does not fit"),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": a_RI}, "layers.7"),
    ):
        with pytest.raises(ModelError, match=reason):
            dict(merged(tensors | changed))
    del tensors[f"{name}.lora_B.weight"]
    with pytest.raises(ModelError, match=name):
        dict(merged(tensors))
