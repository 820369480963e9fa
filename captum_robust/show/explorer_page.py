"""The explorer as a page of Gradio, for the command ``captum-robust app`` and for notebooks."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from captum_robust import draw
from captum_robust._checks import check, check_count
from captum_robust.catalog.words import words_of
from captum_robust.data import load_dataset
from captum_robust.models import Classifier
from captum_robust.show.exploration import Exploration, Explorer, Photograph, Question

if TYPE_CHECKING:
    import gradio
    from jinja2 import Template

LARGEST = 20_000_000
"""Bytes of a photograph that is taken."""
_STRONGEST = 16
_SECONDS = 0.15
"""Between two frames of a camera."""
_SEEN = -1
"""Stands for the class that is seen, among the numbers of classes."""
_STRENGTH = "So many of 255 levels may a pixel change; DeepFool takes what it needs."
_DEFENCE = (
    "Average over five blurred, noisy or compressed copies, of which the attack does not know."
)
_IMAGE = Markup('<img src="{}" alt="The last frame of the camera with the mask" width="100%">')
_HEAD = (
    "# Where does it look, and does the answer hold?\n"
    "Drop a photograph, choose a class, and attack it: class, maps and boxes follow. "
    "All of it stays on this machine, and nothing is kept."
)


@dataclass(frozen=True, repr=False)
class OpenExplorer:
    """An explorer that is open in the background until it is closed, or Python ends."""

    page: gradio.Blocks
    url: str

    def close(self) -> None:
        """Close the page."""
        self.page.close(verbose=False)

    def __repr__(self) -> str:
        return f"explorer at {self.url}"


def explorer(
    model: Classifier,
    methods: str | Iterable[str] | Mapping[str, Any] | None = None,
    *,
    port: int | None = None,
    source: Sequence[str] = (),
) -> OpenExplorer:
    """Open the explorer, in a notebook below the cell, and return at once.

    It can be reached from this machine only, so a notebook shows it where its kernel runs on the
    same one. Nothing is written to the disk.

    Args:
        model: the classifier.
        methods: those whose maps are shown, as for ``compare``; None: a few usual ones.
        port: of the page; None: a free one from 7860.
        source: lines of Python that make ``model``, and ``methods`` where they are no names, for
            the lines that the page gives.

    Raises:
        ImportError: gradio is missing; names the pip command.
        OSError: the port is taken.
    """
    check_count("port", port, 1, 65535, optional=True)
    gr = _gradio()
    own = Explorer(model, methods, *([source] if source else []))
    page: gradio.Blocks = _page(gr, own)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            height=900,
            max_file_size=1,  # no file is uploaded: see upload.js
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
            css=_text("explorer.css"),
        )
    except OSError as error:
        taken = "no port from 7860 is free" if port is None else f"port {port} is taken"
        raise OSError(f"{taken}; give another") from error
    return OpenExplorer(page, str(page.local_url))


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise ImportError('the explorer needs gradio: pip install "captum-robust[app]"') from None
    return gradio


def _page(gr: Any, explorer: Explorer) -> Any:
    samples, usual = _samples(), [("what it sees", _SEEN)]
    with gr.Blocks(title="captum-robust", analytics_enabled=False, fill_width=True) as page:
        photograph = gr.State(None)
        gr.Markdown(_HEAD)
        with gr.Tab("Photograph"), gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.HTML(
                    html_template=_text("upload.html"),
                    js_on_load=_text("upload.js").replace("LARGEST", str(LARGEST)),
                )
                sample = gr.Dropdown(
                    samples, value=None, label="Or one that comes along", visible=bool(samples)
                )
                target = gr.Radio(usual, value=_SEEN, label="Class to explain")
                attack = gr.Radio(list(_attacks(explorer)), value="none", label="Attack")
                levels = gr.Slider(
                    *(0, _STRONGEST, 2), step=1, label="Strength ε", info=_STRENGTH, buttons=[]
                )
                defended = gr.Checkbox(label="Defend", info=_DEFENCE)
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML(_sentence("Drop a photograph, or take one that comes along."))
        with gr.Tab("Camera"):
            gr.Markdown("The mask of what the network sees, frame by frame.")
            small = gr.WebcamOptions(constraints={"video": {"width": 640, "height": 480}})
            with gr.Row():
                camera = gr.Image(
                    sources=["webcam"], streaming=True, label="Camera", webcam_options=small
                )
                live = gr.HTML("")

        def answer(loaded: Photograph | None, target: int, *asked: Any) -> Any:
            if loaded is None:
                return gr.skip()
            question = Question(None if target == _SEEN else target, *asked)
            try:
                found = explorer.explore(loaded, question)
            except ValueError as error:
                return _sentence(str(error))
            return rendered(found, explorer.python(loaded, question))

        def opened(load: Callable[[], Photograph], *asked: Any) -> tuple[Any, ...]:
            try:
                loaded = load()
                classes = explorer.explore(loaded, Question(None, *asked)).clean.classes
            except ValueError as error:
                return None, None, gr.Radio(usual, value=_SEEN), _sentence(str(error))
            rows = [(f"{name} ({share:.0%})", number) for number, name, share in classes]
            radio = gr.Radio([*usual, *rows], value=_SEEN)
            return None, loaded, radio, answer(loaded, _SEEN, *asked)

        def uploaded(file: Mapping[str, str], *asked: Any) -> tuple[Any, ...]:
            return opened(lambda: _read(explorer, file), *asked)

        def chosen(number: int, *asked: Any) -> tuple[Any, ...]:
            image = load_dataset("samples")[number].image
            line = f'load_dataset("samples")[{number}].image'
            return opened(lambda: explorer.photograph(image, samples[number][0], line), *asked)

        asked, shown = [attack, levels, defended], [photograph, target, result]
        upload.upload(uploaded, [upload, *asked], [sample, *shown])
        sample.input(chosen, [sample, *asked], [sample, *shown])
        for control in (target, *asked):
            control.input(answer, [photograph, target, *asked], result, trigger_mode="always_last")
        camera.stream(
            lambda frame: "" if frame is None else _picture(explorer.frame(frame)),
            *(camera, live),
            stream_every=_SECONDS,
            show_progress="hidden",
        )
    return page


def _read(explorer: Explorer, file: Mapping[str, str]) -> Photograph:
    """The photograph that upload.js sent."""
    check(not file["error"], file["error"])
    data = base64.b64decode(file["data"].partition(",")[2])
    check(len(data) <= LARGEST, f"photograph: expected at most {LARGEST:,} bytes")
    return explorer.photograph(data, file["name"])


def _attacks(explorer: Explorer) -> Iterator[tuple[str, str]]:
    """What each attack does, and its name."""
    yield "none", "none"
    yield "another class (PGD)", "pgd"
    yield "another class by the smallest change (DeepFool)", "deepfool"
    if explorer.moved:
        yield f"same class, another map ({words_of(explorer.moved)})", "explanation"


def _samples() -> list[tuple[str, int]]:
    """Name and number of each photograph of the sample set, where its packages are installed."""
    try:
        return [(name, number) for number, name in enumerate(load_dataset("samples").ids)]
    except FileNotFoundError:
        return []


def rendered(found: Exploration, python: str) -> str:
    """An exploration as HTML that holds its pictures and the files to export."""
    stem = Path(found.photograph.name).stem
    facts = json.dumps(found.facts(), indent=1)
    exports = [
        (f"{stem}.explored.png", _data("image/png", found.png()), "Pictures (PNG)"),
        (f"{stem}.explored.json", _data("application/json", facts.encode()), "Numbers (JSON)"),
        (f"{stem}.explored.py", _data("text/x-python", python.encode()), "Python lines"),
    ]
    panels = [
        (title, [(_data("image/jpeg", draw.encode_jpeg(p, 90)), text) for p, text in pictures])
        for title, pictures in found.panels()
    ]
    seen = [("as it is", found.clean.classes)]
    if found.attacked is not None:
        seen.append(("attacked", found.attacked.classes))
    return _template().render(
        sentence=found.sentence(), panels=panels, seen=seen, exports=exports, python=python
    )


def _sentence(text: str) -> str:
    return str(Markup('<p role="alert">{}</p>').format(text))


def _picture(rgb: draw.RGB) -> str:
    return str(_IMAGE.format(_data("image/jpeg", draw.encode_jpeg(rgb, 85))))


def _data(kind: str, content: bytes) -> str:
    """The content as an address, so that no file has to be kept for it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _text(name: str) -> str:
    return (files("captum_robust.show") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_text("explorer.html.j2"))
