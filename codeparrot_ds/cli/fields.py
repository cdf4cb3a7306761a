"""Options of the commands that read documents: which fields of a row hold them."""

from typing import Annotated

import typer

_NAMED = "Default: the usual names, where a row has them."
TextField = Annotated[
    str | None, typer.Option(help="Field that holds the content; a path into objects is a.b. Default: content.")
]
RepositoryField = Annotated[
    str | None, typer.Option("--repository-field", "--repository", help=f"Field with the repository. {_NAMED}")
]
PathField = Annotated[str | None, typer.Option("--path-field", "--path", help=f"Field with the path. {_NAMED}")]
LicenceField = Annotated[
    str | None, typer.Option("--licence-field", "--licence", help=f"Field with the licence. {_NAMED}")
]
SourceField = Annotated[
    str | None, typer.Option("--source-field", "--source", help=f"Field with the origin of the document. {_NAMED}")
]
LanguageField = Annotated[
    str | None, typer.Option("--language-field", "--language", help=f"Field with the programming language. {_NAMED}")
]
CommitField = Annotated[str | None, typer.Option("--commit-field", "--commit", help=f"Field with the commit. {_NAMED}")]
