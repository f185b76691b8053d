//! Importers: from a data set's own files to the directory that `dataset` reads.
