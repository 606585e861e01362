#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb: prose and outputs, its pictures as files in nbs/images/, links made relative to the top.
Usage: .venv/bin/python scripts/readme.py   (seconds, any machine; the same notebook always gives the same bytes)"""
import base64, os, re
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parent.parent

def from_top(text):
    "`text` with the relative links of a notebook in nbs/ as links from the repository's top."
    return re.sub(r"(\]\(|src=\")(?!https?:|#|/|mailto:)([^)\"]+)", lambda m: m[1] + os.path.normpath(f"nbs/{m[2]}"), text)

def output_text(output, images):
    "Markdown of one cell output; a picture is added to `images` and linked."
    if output.output_type == "stream": return f"```\n{output.text.rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        name = f"nbs/images/readme{len(images) + 1}.png"
        images[name] = base64.b64decode(data["image/png"])
        return f"![]({name})"
    if "text/markdown" in data: return from_top(data["text/markdown"].strip())
    return f"```\n{data.get('text/plain', '').rstrip()}\n```"

def render(path):
    "The README of notebook `path`: `(markdown, {image path: bytes})`."
    parts, images = [], {}
    for cell in nbformat.read(path, as_version=4).cells:
        directives = set(re.findall(r"^#\|\s*(\w+)", cell.source, flags=re.M))
        if cell.cell_type == "markdown": parts.append(from_top(cell.source.strip()))
        elif "hide" not in directives:
            if "echo" not in directives: parts.append(f"```python\n{cell.source.strip()}\n```")
            parts += [output_text(o, images) for o in cell.outputs]
    return "\n\n".join(parts) + "\n", images

def main():
    text, images = render(ROOT/"nbs/index.ipynb")
    for old in (ROOT/"nbs/images").glob("readme*.png"): old.unlink()
    for name, data in images.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)
    (ROOT/"README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, {len(images)} picture{'s' * (len(images) != 1)}")

if __name__ == "__main__": main()
