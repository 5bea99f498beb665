"""``python -m ttt``: the command ``ttt`` (`ttt.cli`)."""

from ttt.cli import app

if __name__ == "__main__":
    app()
