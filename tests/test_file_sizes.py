"""Sizes of files by arithmetic, against headers that are really written."""

from hypothesis import given
from hypothesis import strategies as st

from patching.checkpoints.file_sizes import TensorBytes, bytes_of_files
from patching.checkpoints.safetensors_files import StoredTensor, header_of
from patching.checkpoints.splice import plan_files

NAMES = st.text(min_size=1, max_size=30)
SHAPES = st.lists(st.integers(0, 2000), max_size=3).map(tuple)
TENSORS = st.lists(
    st.builds(StoredTensor, NAMES, st.sampled_from(["F32", "BF16", "I64", "U8"]), SHAPES),
    max_size=12,
    unique_by=lambda tensor: tensor.name,
)


@given(TENSORS, st.sampled_from([1, 500, 10_000, 10**9]))
def test_files_are_as_large_as_computed_and_within_the_limit(tensors, max_shard_bytes):
    files = plan_files(tensors, max_shard_bytes)
    written = [len(header_of(file)) + sum(t.num_bytes for t in file) for file in files]
    assert bytes_of_files(TensorBytes.of(tensors), max_shard_bytes) == sum(written)
    assert sorted(tensor for file in files for tensor in file) == sorted(tensors)
    for file, num_bytes in zip(files, written):
        assert num_bytes <= max_shard_bytes or len(file) == 1
        sizes = [t.num_bytes for t in file]
        assert file == sorted(
            file, key=lambda t: -{"F32": 4, "BF16": 2, "I64": 8, "U8": 1}[t.dtype]
        )
        assert sizes


def test_longer_names():
    tensors = [StoredTensor(f"layers.7.{name}", "F32", (3, 5)) for name in "abc"]
    renamed = [tensor._replace(name=tensor.name.replace("7", "123")) for tensor in tensors]
    assert all(
        (a == b).all()
        for a, b in zip(TensorBytes.of(tensors).with_longer_names(2), TensorBytes.of(renamed))
    )
