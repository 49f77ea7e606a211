"""An index of the words in files: `python index.py reindex FOLDER`, `search WORD`, `add FILE`, `remove FILE` or `stats`."""

import asyncio
import re
import sys
from pathlib import Path

from harness_ipc import Service, connect_daemon, method, report, run_daemon


class Index(Service):
    def __init__(self) -> None:
        self.words: dict[str, set[str]] = {}  # of each file

    @method
    async def search(self, word: str) -> list[str]:
        return sorted(file for file, words in self.words.items() if word in words)

    @method
    async def add(self, path: Path) -> None:
        text = await asyncio.to_thread(path.read_text, "utf-8", "replace")
        self.words[str(path)] = set(re.findall(r"\w+", text))

    @method
    async def remove(self, path: Path) -> bool:
        return self.words.pop(str(path), None) is not None

    @method
    async def stats(self) -> dict[str, int]:
        return {"files": len(self.words), "words": len(set().union(*self.words.values()))}

    @method
    async def reindex(self, path: Path) -> int:
        """Index all files below a folder, and forget others. If the caller leaves, it stops, and keeps what was indexed."""
        files = [file for file in path.rglob("*") if file.is_file()]
        self.words = {file: words for file, words in self.words.items() if Path(file) in files}
        for done, file in enumerate(files, 1):
            await self.add(file)
            await report({"done": done, "total": len(files)})
        return len(files)


if __name__ == "__main__" and sys.argv[1:] == ["--serve"]:
    run_daemon(Index(), "index", idle_timeout=3600)
elif __name__ == "__main__":
    verb, value = (*sys.argv[1:], "")[:2]
    params = {"word": value} if verb == "search" else {"path": Path(value).absolute()} if value else {}
    with connect_daemon("index", start=[sys.executable, __file__, "--serve"], request_timeout=600) as index:
        print(index.call(verb, params, on_progress=lambda at: print(f"{at['done']} of {at['total']}", file=sys.stderr)))
