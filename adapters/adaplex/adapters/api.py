"""The surface of adaplex.adapters for adaplex.server, which imports only this module and `errors`.

An import-linter contract in pyproject.toml holds it. Importing this module imports torch; `errors`,
`limits`, `program.traits` and `storage.adapter_record` do not. Modules inside adaplex.adapters
import each other by full path, never through this one.
"""

from adaplex.adapters.checkpoint import read_checkpoint, write_checkpoint
from adaplex.adapters.compose.merge import MAX_SOURCES, MergeMethod, MergePlan
from adaplex.adapters.compose.mix import MAX_COMPONENTS
from adaplex.adapters.formats.bundle import bundle
from adaplex.adapters.formats.table import rows as format_rows
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import BasePolicy
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adaplex.adapters.program.report import Report, describe
from adaplex.adapters.registry.importer import Importer
from adaplex.adapters.registry.intake import Capacity, Committed, Intake
from adaplex.adapters.registry.read_adapter import read_adapter
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.sources.gguf.lora import convert_gguf_lora
from adaplex.adapters.sources.signatures import SignaturePolicy, SignatureVerifier
from adaplex.adapters.sources.sources import Sources
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.adapters.storage.alias_split import MAX_TARGETS, Split, Target
from adaplex.adapters.storage.bucket import Bucket
from adaplex.adapters.storage.bucket_catalog import BucketCatalog
from adaplex.adapters.storage.bucket_content import BucketContent
from adaplex.adapters.storage.catalog import Catalog, Order, Query, StoreUsage
from adaplex.adapters.storage.content_store import ContentStore
from adaplex.adapters.storage.copied_catalog import CopiedCatalog, restore
from adaplex.adapters.storage.event import Event, Origin
from adaplex.adapters.storage.folder_content import FolderContent, is_used
from adaplex.adapters.storage.fsck import check_store
from adaplex.adapters.storage.garbage_collector import GarbageCollector
from adaplex.adapters.storage.lease import Lease
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.selector import Selector
from adaplex.adapters.storage.sqlite_catalog import SqliteCatalog
from adaplex.adapters.storage.staging import FileSpec, Staging

__all__ = [
    "MAX_COMPONENTS",
    "MAX_SOURCES",
    "MAX_TARGETS",
    "AdapterLimits",
    "AdapterProgram",
    "AdapterRecord",
    "AdapterRegistry",
    "BaseModule",
    "BasePolicy",
    "BaseSpec",
    "Bucket",
    "BucketCatalog",
    "BucketContent",
    "Capacity",
    "Catalog",
    "Committed",
    "ContentStore",
    "CopiedCatalog",
    "Event",
    "FileSpec",
    "FolderContent",
    "GarbageCollector",
    "Importer",
    "Intake",
    "Lease",
    "MergeMethod",
    "MergePlan",
    "NameRecord",
    "Order",
    "Origin",
    "Query",
    "Report",
    "Selector",
    "SignaturePolicy",
    "SignatureVerifier",
    "Sources",
    "Split",
    "SqliteCatalog",
    "Staging",
    "StoreUsage",
    "Target",
    "bundle",
    "check_store",
    "convert_gguf_lora",
    "describe",
    "format_rows",
    "is_used",
    "read_adapter",
    "read_checkpoint",
    "restore",
    "write_checkpoint",
]
