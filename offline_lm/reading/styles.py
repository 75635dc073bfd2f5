"""How a page is written and how an action on it is: in the manners of the recorders that people use.

A page is a list of elements; a `Style` turns it into text, and an act on one of its elements into a command.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

HEADING, TEXT, LINK, BUTTON, FIELD, MENU, BOX, RADIO, CELL = (
    "heading", "text", "link", "button", "textbox", "combobox", "checkbox", "radio", "cell",
)  # fmt: skip


@dataclass
class Element:
    """One thing on a page.

    Attributes:
        role: one of the constants above.
        name: what it says.
        value: what a field holds.
        on: whether a box or radio button is set.
        depth: how deep it is nested.
        ident: its number on the page, given by `Style.write`.
    """

    role: str
    name: str
    value: str = ""
    on: bool = False
    depth: int = 0
    ident: str = field(default="", compare=False)


@dataclass(frozen=True)
class Style:
    """One manner of writing: `look` of the page, `grammar` of the actions, and small things that vary with the site."""

    look: str
    grammar: str
    by_name: bool
    quote: str
    click: str
    type: str
    say: str
    prefix: str
    case: str

    @classmethod
    def draw(cls, rng: Random) -> Style:
        look = rng.choice(("axtree", "aria", "html", "plain", "indexed", "axtree", "plain"))
        grammar = rng.choice({
            "axtree": ("call", "call", "webarena", "json"),
            "aria": ("playwright", "call", "json", "ref"),
            "html": ("call", "words", "json", "webarena"),
            "plain": ("bracket", "bracket", "words", "ref"),
            "indexed": ("json", "webarena", "call", "words"),
        }[look])  # fmt: skip
        return cls(
            look=look,
            grammar=grammar,
            by_name=look == "plain" or grammar == "playwright" or rng.random() < 0.2,
            quote=rng.choice("'\""),
            click=rng.choice(("click", "click", "click", "press", "tap", "select", "open", "choose")),
            type=rng.choice(("fill", "type", "input_text", "enter", "set")),
            say=rng.choice(("answer", "send_msg_to_user", "stop", "finish", "done", "respond")),
            prefix=rng.choice(("", "", "", "e", "a", "ref")),
            case=rng.choices(("lower", "title", "sentence", "upper"), (8, 4, 3, 1))[0],
        )

    def cased(self, text: str) -> str:
        """How words stand on this site's pages; goals keep to lower case."""
        match self.case:
            case "title":
                return text.title()
            case "sentence":
                return text[:1].upper() + text[1:]
            case "upper":
                return text.upper()
        return text

    # -- pages -------------------------------------------------------------------------------------------------

    def write(self, elements: list[Element], rng: Random) -> str:
        """The page's text; every element gets its number."""
        number = rng.choice((0, 1, 3, rng.randrange(10, 400)))
        lines = []
        for element in elements:
            number += rng.choice((1, 1, 1, 2, 3))
            element.ident = f"{self.prefix}{number}"
            lines.append(self._line(element))
        return "\n".join(lines)

    def _line(self, e: Element) -> str:
        q, name = self.quote, e.name
        match self.look:
            case "axtree":
                tail = f" value={q}{e.value}{q}" if e.role in (FIELD, MENU) and e.value else ""
                tail += f", checked={q}{str(e.on).lower()}{q}" if e.role in (BOX, RADIO) else ""
                tail += ", clickable" if e.role in (LINK, BUTTON) and self.prefix == "a" else ""
                if e.role == TEXT:
                    return f"{'  ' * e.depth}StaticText {q}{name}{q}"
                return f"{'  ' * e.depth}[{e.ident}] {e.role} {q}{name}{q}{tail}"
            case "aria":
                if e.role == TEXT:
                    return f"{'  ' * e.depth}- text: {name}"
                tail = " [checked]" if e.on else ""
                return f'{"  " * e.depth}- {e.role} "{name}"{tail} [ref={e.ident}]{": " + e.value if e.value else ""}'
            case "html":
                tag = {HEADING: "h2", TEXT: "p", LINK: "a", FIELD: "input", MENU: "select", CELL: "td"}.get(
                    e.role, e.role
                )
                if e.role in (FIELD, MENU):
                    return f"<{tag} id={q}{e.ident}{q} name={q}{name}{q} value={q}{e.value}{q}>"
                if e.role in (BOX, RADIO):
                    return f"<input type={e.role} id={q}{e.ident}{q}{' checked' if e.on else ''}>{name}"
                return f"<{tag} id={q}{e.ident}{q}>{name}</{tag}>" if e.role != TEXT else f"<p>{name}</p>"
            case "indexed":
                mark = f"[{e.ident}]" if self.quote == "'" else f"{e.ident}:"
                if e.role in (HEADING, TEXT):
                    return name
                held = f" = {e.value}" if e.value else " (on)" if e.on else ""
                return f"{mark}<{e.role}>{name}{held}" if self.quote == "'" else f"{mark} {name} ({e.role}){held}"
        held = f": {e.value or 'none'}" if e.role in (FIELD, MENU) else ""
        if e.role in (BOX, RADIO):
            return f"({'x' if e.on else ' '}) {name}"
        return f"[{name}]{held}" if e.role in (LINK, BUTTON, FIELD, MENU) else name

    # -- actions -----------------------------------------------------------------------------------------------

    def press(self, e: Element) -> str:
        """The command that clicks an element."""
        at = e.name if self.by_name else e.ident
        match self.grammar:
            case "call":
                return f"{self.click}({self.quote}{at}{self.quote})"
            case "webarena":
                return f"{self.click} [{at}]"
            case "bracket":
                return f"{self.click}[{at}]"
            case "words":
                return f"{self.click.upper()} {at}"
            case "json":
                return f'{{"action": "{self.click}", "index": "{at}"}}'
            case "ref":
                return f"{self.click} {'' if self.by_name else 'ref='}{at}"
        return f'page.getByRole("{e.role}", {{ name: "{e.name}" }}).click()'

    def enter(self, e: Element, value: str) -> str:
        """The command that types a value into a field or chooses it there."""
        at = e.name if self.by_name else e.ident
        match self.grammar:
            case "call":
                return f"{self.type}({self.quote}{at}{self.quote}, {self.quote}{value}{self.quote})"
            case "webarena":
                return f"{self.type} [{at}] [{value}]"
            case "bracket":
                return f"{self.type}[{at}, {value}]"
            case "words":
                return f"{self.type.upper()} {value} INTO {at}"
            case "json":
                return f'{{"action": "{self.type}", "index": "{at}", "text": "{value}"}}'
            case "ref":
                return f"{self.type} {'' if self.by_name else 'ref='}{at} = {value}"
        return f'page.getByRole("{e.role}", {{ name: "{e.name}" }}).fill("{value}")'

    def tell(self, value: str) -> str:
        """The command that answers the user, or with no value says that all is done."""
        match self.grammar:
            case "call" | "playwright":
                return f"{self.say}({self.quote}{value}{self.quote})" if value else f"{self.say}()"
            case "json":
                return f'{{"action": "{self.say}", "text": "{value}"}}' if value else f'{{"action": "{self.say}"}}'
            case "words" | "ref":
                return f"{self.say} {value}".strip()
        return f"{self.say} [{value}]" if self.grammar == "webarena" else f"{self.say}[{value}]"
