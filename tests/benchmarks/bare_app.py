"""A bare Typer app: the least that any `--help` costs."""

import typer

app = typer.Typer()


@app.command()
def first(name: str = "world") -> None:
    """Greet."""
    print(f"Hello {name}")


@app.command()
def second(name: str = "world") -> None:
    """Take leave."""
    print(f"Goodbye {name}")


if __name__ == "__main__":
    app()
