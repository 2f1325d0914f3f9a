package migrations

// What the tests look at inside. They are outside the package, since testenv, which
// they use, imports it.
const (
	LockKey               = lockKey
	InsufficientPrivilege = insufficientPrivilege
)

var (
	MessageColumns = messageColumns
	Quote          = quote
	Rename         = rename
)

func (t Target) Qualified() string { return t.qualified() }

func (t Target) Numbered() ([]File, error) { return t.numbered() }
