"""Which texts also appear in others."""

from patching.files.texts import num_found_in


def test_texts_are_found_however_they_are_cut():
    lines = [f"line {i} is long enough that no other text has it too" for i in range(9)]
    others = ["\n".join(lines[:4]), f"  {lines[4]}\n\n{lines[5]}", "a short one", "# Licence"]
    texts = {
        "\n".join(lines[2:5]): True,
        "\n".join(["# Licence", *lines[6:8]]): False,  # short lines prove nothing
        "\n".join(lines[5:7]): True,
        "\n".join(lines[5:8]): False,  # less than half
        " a short one": True,
        "another short one": False,
    }
    for text, is_found in texts.items():
        assert num_found_in([text], others) == is_found
    assert num_found_in(texts, others) == 3
