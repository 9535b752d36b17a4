"""The name of a BigQuery table, in each of the spellings that a service or a tool wants.

Its parts are never cut out of a joined name: a domain-scoped project (``example.com:my-proj``)
has dots itself.
"""

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True, slots=True)
class TableName:
    """A table's name by its parts.

    Attributes:
        project: A project id, domain-scoped or not.
        dataset: Its dataset.
        table: The table's own name, which may have letters of any script, and spaces.
    """

    project: str
    dataset: str
    table: str

    def __str__(self) -> str:
        """Return ``project.dataset.table``, as in GoogleSQL between backquotes."""
        return f"{self.project}.{self.dataset}.{self.table}"

    @property
    def for_bq(self) -> str:
        """``project:dataset.table``, as the command bq takes it."""
        return f"{self.project}:{self.dataset}.{self.table}"

    @property
    def resource(self) -> str:
        """``projects/P/datasets/D/tables/T``, as the write API has it."""
        return f"projects/{self.project}/datasets/{self.dataset}/tables/{self.table}"

    @property
    def url_path(self) -> str:
        """The table's path below the REST endpoint, percent-encoded."""
        project, dataset, table = (
            quote(part, safe=":") for part in (self.project, self.dataset, self.table)
        )
        return f"/bigquery/v2/projects/{project}/datasets/{dataset}/tables/{table}"
