package config

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strings"
)

const redacted = "[redacted]"

// Secret is a value that is never printed: given as it is, or the content of a
// file. The zero value is no secret. Safe for concurrent use.
type Secret struct {
	read func() (string, error) // a func, so that no fmt verb reaches the value
}

// NewSecret returns a secret with this value; an empty one is none.
func NewSecret(value string) Secret {
	if value == "" {
		return Secret{}
	}
	return Secret{func() (string, error) { return value, nil }}
}

// newFileSecret returns what is in the file at each read. The newline that ends
// a file is not part of it.
func newFileSecret(variable, path string) Secret {
	return Secret{func() (string, error) {
		content, err := os.ReadFile(path)
		if err != nil {
			return "", &Fault{variable, "names a file that cannot be read: " + reason(err)}
		}
		value := strings.TrimSuffix(strings.TrimSuffix(string(content), "\n"), "\r")
		if value == "" {
			return "", &Fault{variable, "names a file that is empty: write the value into it"}
		}
		return value, nil
	}}
}

// IsSet reports whether there is a secret.
func (s Secret) IsSet() bool { return s.read != nil }

// Value returns the secret; one that lives in a file is read at each call. An
// error, which never shows it, may pass: the file may just be replaced.
func (s Secret) Value() (string, error) {
	if s.read == nil {
		return "", nil
	}
	return s.read()
}

// trimmed returns the secret without white space around it.
func (s Secret) trimmed(variable string) Secret {
	return Secret{func() (string, error) {
		value, err := s.read()
		value = strings.TrimSpace(value)
		if err == nil && value == "" {
			err = &Fault{variable, "is nothing but white space: give it a value"}
		}
		return value, err
	}}
}

func (s Secret) String() string {
	if s.read == nil {
		return ""
	}
	return redacted
}

func (s Secret) GoString() string             { return "config.Secret(" + s.String() + ")" }
func (s Secret) LogValue() slog.Value         { return slog.StringValue(s.String()) }
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// readSecret takes the value or its file. Where there is a check, it must pass,
// and white space around the value is dropped.
func readSecret(f *faults, value, file text, check func(string) error) Secret {
	var given text
	var s Secret
	switch {
	case value.given() && file.given():
		f.add(value.name, "and %s are both set: keep one of them", file.name)
		return s
	case value.given():
		given, s = value, NewSecret(value.value)
	case file.given():
		given, s = file, newFileSecret(file.name, file.value)
	default:
		if value.mandatory {
			f.add(value.name, "is not set: set it, or %s", file.name)
		}
		return s
	}
	if check != nil {
		s = s.trimmed(given.name)
	}
	v, err := s.Value()
	if err != nil {
		*f = append(*f, err)
		return s
	}
	if check == nil {
		return s
	}
	what := ""
	if file.given() {
		what = "names a file whose value "
	}
	if err := check(v); err != nil {
		f.add(given.name, "%s%s", what, err)
	}
	return s.checked(given.name, what, check)
}

// checked returns the secret, refused at each read where the check fails: a
// file may have been given another value since the start.
func (s Secret) checked(variable, what string, check func(string) error) Secret {
	return Secret{func() (string, error) {
		value, err := s.read()
		if err != nil {
			return "", err
		}
		if err := check(value); err != nil {
			return "", &Fault{variable, what + err.Error()}
		}
		return value, nil
	}}
}

// reason is why a file cannot be read, without its name.
func reason(err error) string {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err.Error()
	}
	return err.Error()
}
