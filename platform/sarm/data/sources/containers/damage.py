"""What a file that breaks off, or was damaged, raises while it is read."""

import tarfile
import zipfile
import zlib
from lzma import LZMAError

import pyarrow as pa

DAMAGE = (OSError, EOFError, zlib.error, LZMAError, pa.ArrowException, tarfile.TarError, zipfile.BadZipFile)
