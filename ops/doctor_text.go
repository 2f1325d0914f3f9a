package ops

import (
	"fmt"
	"strings"
)

// Columns of the doctor's text: the state, the check's name, and what was found.
const (
	stateWidth = 9
	nameWidth  = 24
)

var groupNames = map[string]string{"postgres": "Postgres", "nats": "NATS"}

// text is the diagnosis for people. A line that is a command is never broken, so
// that it can be pasted.
func (d Diagnosis) text() string {
	var b strings.Builder
	group := ""
	for _, c := range folded(d.Checks) {
		if c.Group != group {
			if group = c.Group; b.Len() > 0 {
				b.WriteByte('\n')
			}
			fmt.Fprintf(&b, "%s\n", groupNames[group])
		}
		c.text(&b)
	}
	fmt.Fprintf(&b, "\n%s\n", d.summary())
	return b.String()
}

// folded makes one line of checks that were not looked at for the same reason.
func folded(checks []Check) []Check {
	var lines []Check
	for i, c := range checks {
		switch last := len(lines) - 1; {
		case c.State != stateSkipped:
			lines = append(lines, c)
		case i > 0 && checks[i-1].State == stateSkipped && checks[i-1].Found == c.Found && checks[i-1].Group == c.Group:
			lines[last].Found += ", " + c.Name
		default:
			lines = append(lines, Check{Group: c.Group, Name: "not looked at", State: c.State, Found: c.Found + ": " + c.Name})
		}
	}
	return lines
}

func (d Diagnosis) summary() string {
	if d.Faults+d.Warnings+d.Skipped == 0 {
		return "Nothing is wrong."
	}
	return fmt.Sprintf("Faults: %d, warnings: %d, not looked at: %d.", d.Faults, d.Warnings, d.Skipped)
}

func (c Check) text(b *strings.Builder) {
	state := c.State
	if state == stateSkipped {
		state = "-"
	}
	margin := strings.Repeat(" ", 2+stateWidth)
	head := fmt.Sprintf("  %-*s%-*s", stateWidth, state, nameWidth, c.Name)
	for _, part := range wrap(printable(c.Found), textWidth-2-stateWidth-nameWidth) {
		fmt.Fprintf(b, "%s%s\n", head, part)
		head = strings.Repeat(" ", 2+stateWidth+nameWidth)
	}
	if c.Remedy != "" && c.Remedy != c.SQL {
		for i, part := range wrap(printable(c.Remedy), textWidth-2-stateWidth-3) {
			fmt.Fprintf(b, "%s%s%s\n", margin, []string{"-> ", "   "}[min(i, 1)], part)
		}
	}
	if c.SQL != "" {
		fmt.Fprintf(b, "%ssql   %s;\n", margin, printable(c.SQL))
	}
	if c.Shell != "" {
		fmt.Fprintf(b, "%sshell %s\n", margin, printable(c.Shell))
	}
}
