package main

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"os"
	"path/filepath"
)

// archive writes a tar.gz of the binary and what goes with it, in one folder. It
// depends on nothing but the files' content and the release's time.
func (r *release) archive(path, folder, binary, system string) (err error) {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	packed := gzip.NewWriter(file)
	files := tar.NewWriter(packed)
	if err := r.add(files, filepath.Join(folder, "outbox-relay"), binary, 0o755); err != nil {
		return err
	}
	for _, name := range r.documents(system) {
		if err := r.add(files, filepath.Join(folder, filepath.Base(name)), filepath.Join(r.source, name), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(files.Close(), packed.Close())
}

func (r *release) documents(system string) []string {
	names := []string{"LICENSE", "README.md", "CHANGELOG.md"}
	if system == "linux" {
		names = append(names, "deploy/systemd/outbox-relay.service")
	}
	return names
}

func (r *release) add(files *tar.Writer, name, path string, mode int64) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content)), ModTime: r.time, Format: tar.FormatUSTAR}
	if err := files.WriteHeader(header); err != nil {
		return err
	}
	_, err = files.Write(content)
	return err
}
