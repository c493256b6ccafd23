"""What a checkpoint folder holds for others: a chat template, a model card, sentence-transformers' files."""

import json
import os

import huggingface_hub
import jinja2
import pytest

from data import TEMPLATE
from files.errors import DataError
from files.items import parse_item
from hub.card import chat_template
from hub.folders import HUB_FILES
from model import Plume
from test_plume import make_model, QUICK
from tests.processes import call
from tests.samples import picture

OWN = dict(system='You "embed" {x} \N{GRINNING FACE}.', anchor=" -> <disc_emb> : {prompt}")


def turn(content):
    return dict(role="user", content=content)


@pytest.mark.parametrize("settings", [{}, dict(template=TEMPLATE | OWN), dict(white_image=True)])
def test_the_chat_template_of_the_tokenizer_gives_the_prefix_of_encode(settings, tmp_path):
    make_model(**settings).float().save_pretrained(tmp_path / "ck")
    p = Plume.from_pretrained(tmp_path / "ck", "cpu").processor
    bar, pads = picture("red", "bar", (84, 56)), (p.id["<|image_pad|>"], p.id["<|video_pad|>"])
    text = dict(type="text", text=" what <b>is</b> it?\n")
    for content, item in (
        ([text], text["text"]),
        ([dict(type="image", image=bar), text], dict(image=bar, text=text["text"])),
        ([text, dict(type="video", video=[bar])], dict(video=[bar], text=text["text"] + "<video>")),
        ("red", "red"),
    ):
        ids = p.render(parse_item(item))["ids"]  # others' software puts a picture's pads where one stands
        one_a_picture = [token for i, token in enumerate(ids) if token not in pads or ids[i - 1] != token]
        assert p.tokenizer.apply_chat_template([turn(content)])["input_ids"] == one_a_picture
    assert (tmp_path / "ck" / "chat_template.jinja").read_text() == p.tokenizer.chat_template


@pytest.mark.parametrize("messages, why", [
    ([dict(role="system", content="x")], "one turn of the user"),
    ([turn([]), turn([])], "one turn of the user"),
    ([turn([dict(type="audio")])], "text, image and video, not audio"),
])
def test_the_chat_template_refuses_what_plume_does_not_embed(model, messages, why):
    with pytest.raises(jinja2.TemplateError, match=why):
        template = chat_template(model.processor)
        model.processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def test_a_revision_and_a_token_reach_the_hub(small, monkeypatch):
    asked = []

    def download(name, **given):
        asked.append((name, given["revision"], given["token"]))
        return os.fspath(small)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Plume.from_pretrained("somebody/plume", "cpu", revision="v2", token="secret")
    Plume.from_pretrained("somebody/plume", "cpu")
    assert asked == [("somebody/plume", "v2", "secret"), ("somebody/plume", None, None)]
    with pytest.raises(DataError, match="has no revision 'v2'"):
        Plume.from_pretrained(small, "cpu", revision="v2")


def test_the_model_card_is_written_anew_and_somebody_elses_stays(tmp_path):
    folder, m = tmp_path / "ck", make_model().float()
    file = folder / "README.md"
    for steps in (5, 3):
        m.settings["latent_steps"] = steps
        m.save_pretrained(folder)
        card = file.read_text()
        assert "of 128 numbers" in card and f"in {steps} continuous latent steps" in card and "$" not in card
        assert json.loads(card.split("```json\n")[1].split("```")[0]) == m.settings
    file.write_text("my own")
    m.save_pretrained(folder)
    assert file.read_text() == "my own"
    m.save_pretrained(folder, released=True)
    assert not set(HUB_FILES) & set(os.listdir(folder))


def test_the_card_of_a_run_has_its_flags_and_its_last_held_out_score(world, tmp_path):
    flags = ["--data", world / "train.jsonl", "--steps=4", "--eval_every=2", "--keep=1", "--save_every=2"]
    printed = call("train.py", "--out", tmp_path / "out", *QUICK, *flags)
    score = printed.stdout.split("hit@1 ")[-1].split(" ")[0]
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    assert "4 of 4 steps" in card and f"hit@1 {score} on 2 held-out pairs after 4 steps." in card
    assert "--steps 4" in card and "--eval_every 2" in card
    assert str(tmp_path) not in card  # where it was written is not part of the recipe
