"""Every data set under shared/data, with the options that a user would read it with."""

from __future__ import annotations

from dataclasses import dataclass, field

from tiny_models import SHARED

DATA = SHARED / "data"


@dataclass(frozen=True)
class Folder:
    """A file or folder, the options that name its fields, its rows (and those held out), and what `data` calls it."""

    name: str
    rows: tuple[int, ...]
    said: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The path and the options as on the command line."""
        named = [word for key, value in self.options.items() for word in (f"--{key}", value)]
        return [str(DATA / self.name), *named]


FOLDERS = [
    Folder("scitldr", (1992, 619), "jsonl, columns", {"columns": "prompt=source,completion=target"}),
    Folder("dialogsum", (601,), "jsonl, messages"),
    Folder("dialogsum/dialogsum.dev.jsonl", (500,), "jsonl, columns",
           {"columns": "prompt=dialogue,completion=summary"}),
    Folder("webquestions", (2834, 755), "json, columns", {"columns": "prompt=qText,completion=answers"}),
    Folder("piqa", (1838,), "jsonl, piqa", {"format": "piqa"}),
    Folder("e2e", (4672,), "csv, columns", {"columns": "prompt=mr,completion=ref"}),
    Folder("persona_chat", (1000,), "csv, columns",
           {"columns": "prompt=user 1 personas,completion=Best Generated Conversation"}),
    Folder("taskmaster4", (210,), "json, columns", {"columns": "messages=utterances"}),
    Folder("instructions/instruction-data.json", (1100,), "json, instruction"),
    Folder("instructions/seed_tasks.jsonl", (175,), "jsonl, columns",
           {"columns": "prompt=instruction,completion=instances.output"}),
    Folder("grimm", (969,), "text, text"),
    Folder("tinyshakespeare", (7222,), "text, text"),
    Folder("tinystories/tinystories.txt", (1230,), "text, text"),
    Folder("tinystories/tinystories_sample.txt", (5,), "text, text"),
]  # fmt: skip
